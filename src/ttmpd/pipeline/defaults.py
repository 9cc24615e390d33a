"""The values that settings have when nothing else is asked for; read without torch, for ``ttmpd --help``."""

from typing import Final

METHODS: Final = {
    "select": "random",
    "adapt": "norm",
    "score": "ttmpd",
    "plan": "knapsack",
    "distill": "one_time",
    "runtime": "eager",
    "early_exit": "right_tool",
}
"""The method of each setting; a test compares them with :class:`ttmpd.Settings`."""
NUM_SAMPLES: Final = 500
POOL: Final = 5000
HOLDOUT: Final = 0.15
BATCH_SIZE: Final = 64
DEVICE: Final = "auto"
SEED: Final = 0
AMP: Final = "auto"
EXIT_NUM_SAMPLES: Final = 1000
"""Early exits learn from the samples alone and need more of them."""
EXIT_BATCH_SIZE: Final = 1
"""A sample leaves early on its own."""
SERVE_NUM_SAMPLES: Final = 512
"""Samples that a service collects before it compresses."""
STUDENT_FRACTION: Final = 0.1
STUDENT_ALPHA: Final = "auto"
STUDENT_TEMPERATURE: Final = 4.0
STUDENT_VIEWS: Final = 16
STUDENT_STEPS: Final = 3000
STUDENT_BATCH_SIZE: Final = 64
STUDENT_LR: Final = 0.05
"""Of a student that is trained on labels; a test compares them with :class:`ttmpd.students.recipe.Recipe`."""
