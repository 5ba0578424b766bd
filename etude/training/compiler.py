"""What torch's compiler is asked to do otherwise.

It has places for such wishes, but does not document them: with a torch that has moved them, asking fails. Importing this takes seconds.
"""

import torch
from torch._functorch import config as autograd_config
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.decomposition import decompositions, fast_random_decomps
from torch._inductor.lowering import make_fallback, require_contiguous
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 2**14  # elements of a row: as many as a small vocabulary has


def keep_gradients() -> None:
    """From now on, have the next start find the gradients of what is compiled in the cache, too.

    The compiler keeps what it made of a graph, but not how it derived the graph's gradients if that has an autograd function of its own,
    or leaves autocast for a while: such things may depend on more than the cache's key is made of. Etude's do not: all their code is in
    the graph, constants included, and the key is the graph. Deriving them anew takes half of a start.
    """
    autograd_config.autograd_cache_allow_custom_autograd_functions = True
    for name in ("_enter_autocast", "_exit_autocast"):
        config.unsafe_marked_cacheable_functions[f"torch.amp.autocast_mode.{name}"] = "etude"


def embed_in_order() -> None:
    """From now on, have compiled code add up the embedding's gradient as code that is not compiled does: each row by one thread.

    The compiler's own code has all threads of a CPU add wherever they like, in the order in which they come, so that the last bits
    would be others each time.
    """
    gradient = torch.ops.aten.embedding_dense_backward.default
    for table in (decompositions, fast_random_decomps()):  # the second is a copy, made once
        table.pop(gradient, None)
    # Asked for, not left to the compiler to find out: where the variable CI is set it takes that for a mistake.
    make_fallback(gradient, require_contiguous, warn=False)
    config.unsafe_marked_cacheable_functions["etude.embed_in_order"] = "etude"  # tells such code apart in the cache


def hold_long_rows() -> None:
    """From now on, have the compiler hold longer rows; code that has been compiled stays as it is."""
    config.inductor_choices_class = LongRowsAreHeld
    V.set_choices_handler(LongRowsAreHeld())  # this thread may have one already


class LongRowsAreHeld(InductorChoices):
    """To round a row to 8 bits it must be gone over twice, once for its scale and once to divide by it; and so must a row of logits, for
    its sum and for its softmax. The compiler holds rows of up to 1,024 elements in a multiprocessor's registers meanwhile, and reads
    longer ones twice; yet longer ones fit as well, and these kernels do nothing but read and write.
    """

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
