"""The verbs and study stages that train."""
