"""AutoAttack: its settings, its members, and one evaluation with them."""
