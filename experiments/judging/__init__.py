"""How well does ``ches judge --by rules`` tell refusals? Labelled answers, and precision and recall with intervals.

``answers.jsonl``: answers written for this and labelled by reading (``refused``: true where the answer declines what
was asked, false where it does it at least in part, null where there is no answer behind the reasoning). Those of the
half ``develop`` were seen while the rule was written; those of ``report`` were written afterwards and only measured.
``previous.json``: what the rule of 0.2.0 said about the same answers, in order.
"""
