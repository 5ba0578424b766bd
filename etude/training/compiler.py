"""What torch's compiler is asked to do otherwise when training multiplies in 8 bits.

To round a row it must be gone over twice, once for its scale and once to divide by it; and so must a row of logits, for its sum and for
its softmax. The compiler holds rows of up to 1,024 elements in a multiprocessor's registers meanwhile, and reads longer ones twice; yet
longer ones fit as well, and these kernels do nothing but read and write.

The compiler has a place for such wishes, but does not document it: with a torch that has moved it, importing this fails. It takes seconds, too.
"""

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 2**14  # elements of a row: as many as a small vocabulary has


class LongRowsAreHeld(InductorChoices):
    @staticmethod
    def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if cooperative_reduction or not config.triton.persistent_reductions:
            return False
        along_rows = features.get_reduction_hint() == ReductionHint.INNER
        return along_rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST)

    def uuid(self) -> str:
        """What compiled code in the cache is told apart by."""
        return f"etude: rows of {LONGEST} are held"


def hold_long_rows() -> None:
    """From now on; code that has been compiled stays as it is."""
    config.inductor_choices_class = LongRowsAreHeld
    V.set_choices_handler(LongRowsAreHeld())  # this thread may have one already
