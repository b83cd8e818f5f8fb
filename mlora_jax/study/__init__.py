"""The comparison of nested methods over several models and tasks: what is compared, in what order, and the tables."""
