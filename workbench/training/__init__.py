"""Training a LightningModule: loop, exact resuming, order of the data, saving. Names are imported on first use."""

from typing import TYPE_CHECKING

from workbench import lazy

if TYPE_CHECKING:
    from workbench.training.calibration import FirstBatches, TrainingLoss
    from workbench.training.callbacks import CPUThreads, History
    from workbench.training.loop import train
    from workbench.training.module import StepOutput, SupervisedModule, TaskModule
    from workbench.training.order import EpochIndex, EpochOrder, OrderedLoader, with_epoch_order
    from workbench.training.resume import ResumeState

__all__ = [
    "CPUThreads",
    "EpochIndex",
    "EpochOrder",
    "FirstBatches",
    "History",
    "OrderedLoader",
    "ResumeState",
    "StepOutput",
    "SupervisedModule",
    "TaskModule",
    "TrainingLoss",
    "train",
    "with_epoch_order",
]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "CPUThreads": "workbench.training.callbacks",
        "EpochIndex": "workbench.training.order",
        "EpochOrder": "workbench.training.order",
        "FirstBatches": "workbench.training.calibration",
        "History": "workbench.training.callbacks",
        "OrderedLoader": "workbench.training.order",
        "ResumeState": "workbench.training.resume",
        "StepOutput": "workbench.training.module",
        "SupervisedModule": "workbench.training.module",
        "TaskModule": "workbench.training.module",
        "TrainingLoss": "workbench.training.calibration",
        "train": "workbench.training.loop",
        "with_epoch_order": "workbench.training.order",
    },
)
