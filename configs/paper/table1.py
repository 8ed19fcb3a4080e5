"""Table 1: AT, TRADES and MART without and with AGR under six attacks.

Command: python launch.py --job=sweep --config=configs/paper/table1.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    return plans.whole_table(1, scale)
