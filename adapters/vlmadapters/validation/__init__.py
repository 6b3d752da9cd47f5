"""A choice of layers against its competitors."""
