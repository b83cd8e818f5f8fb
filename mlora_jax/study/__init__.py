"""The study, a comparison of nested methods over several models and tasks: rivals, queue, statistics and tables."""
