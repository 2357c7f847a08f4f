"""The programs that the tests read are no modules of the tests."""

collect_ignore = ["scripts", "fixtures"]
