"""Table 2: the models of Table 1 under L2 and L1 attacks.

Command: python launch.py --job=sweep --config=configs/paper/table2.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    return plans.whole_table(2, scale)
