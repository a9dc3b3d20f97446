"""``python -m workbench run RECIPE``: the same as ``lightning run RECIPE``."""

from workbench.launcher.cli import main

if __name__ == "__main__":
    main("workbench")
