"""Requests as the harness hands them to a model."""

from lm_eval.api.instance import Instance


def instances(kind, arguments) -> list[Instance]:
    return [Instance(kind, {}, args, number, ("task", number, 1)) for number, args in enumerate(arguments)]
