import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.compact_checkpoints import bert
from workbench import load, save
from workbench.checkpoints import compact
from workbench.models import MLP


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save(MLP(4, (4,), 2), tmp_path / "a")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o644}


def test_importing_it_needs_torch_and_safetensors_only() -> None:
    code = (
        "import sys; from workbench.checkpoints import compact; from workbench import load, save\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'transformers', 'torchmetrics', 'datasets', 'prune', "
        "'distill', 'scipy', 'jsonargparse'} & set(sys.modules)), "
        "sorted(name for name in sys.modules if name.startswith('workbench.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] " + repr(
        [
            *(
                "workbench.checkpoints",
                "workbench.checkpoints.bits",
                "workbench.checkpoints.compact",
                "workbench.files",
                "workbench.lazy",
            ),
            *("workbench.models", "workbench.models.architecture", "workbench.models.resize"),
            "workbench.models.wrappers",
        ]
    )


def test_transformers_does_not_take_the_folder_for_a_model_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModel, BertForSequenceClassification

    save(bert(), tmp_path)
    for cls in (AutoModel, BertForSequenceClassification):
        with pytest.raises((OSError, ValueError)):
            cls.from_pretrained(tmp_path)


def test_it_is_found_in_a_stage(tmp_path: Path) -> None:
    save(MLP(4, (4,), 2), tmp_path / "stage" / "compact")
    assert compact.find(tmp_path / "stage") == tmp_path / "stage" / "compact"
    load(tmp_path / "stage")
    with pytest.raises(ValueError, match=r"holds no compact checkpoint: expected checkpoint\.json"):
        load(tmp_path)
