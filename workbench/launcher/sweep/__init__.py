"""One stage repeated over a grid of arguments.

`grid` makes named settings of what a recipe says, `runs` is what the `job` is given, `task` performs one run.
Runs are performed `in_place`, in `processes` or `on_ray`; `watch` shows how far they are, `summary` adds them up.
"""
