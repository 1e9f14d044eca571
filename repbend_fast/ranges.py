"""Names of a step's parts in a ``torch.profiler`` trace. Outside of a profile a range costs microseconds, once a piece
or a block.

``benchmarks/step/step_profile.py`` adds up what runs in each of them.
"""

SEARCH = "repbend: search of a perturbation"
REFERENCE = "repbend: reference pass"
SUMS = "repbend: first pass for coupled sums"
ADAPTED = "repbend: adapted pass"
BACKWARD = "repbend: backward"
# Once in the adapted pass, and again inside backward: the second is the recomputation.
CHECKPOINTED = "repbend: checkpointed block"
