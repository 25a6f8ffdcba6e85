"""What the caller of `run_training` does while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import optax
from flax import nnx

from esft_jax.errors import InputError
from esft_jax.model.transformer import Transformer
from esft_jax.training.state import TrainState
from esft_jax.training.step import Loss, token_loss

# Of `on_log` and `on_eval`: the step, and its metrics by name.
Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class StepInfo:
    """A step that is done, as a hook sees it.

    Attributes:
        step: its number, from 1.
        steps: how many the run makes.
        state: after it. The next step takes over its arrays: what is to be kept must be copied.
        frozen: the parameters that are not trained.
        metrics: float32 scalars on the devices, see `make_train_step`.
        graph: the model's structure.
    """

    step: int
    steps: int
    state: TrainState
    frozen: nnx.State
    metrics: dict[str, jax.Array]
    graph: nnx.GraphDef

    @property
    def model(self) -> Transformer:
        """The model as it is now; its trained arrays are those of `state`."""
        return nnx.merge(self.graph, self.state.tuned, self.frozen)


@dataclass(frozen=True)
class Hook:
    """A function that is called after every n-th step, when its log, evaluation and checkpoint are
    done. A run with hooks waits for the steps that have one.

    On several processes, all call it. After a kill, steps since the last checkpoint are made, and
    their hooks called, again. The time of hooks does not count as work of the run.

    Attributes:
        call: the function.
        every: n.

    Raises:
        InputError: `every` is not a positive whole number.
    """

    call: Callable[[StepInfo], None]
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise InputError(f"every: {self.every!r}; expected a whole number of steps, at least 1")

    def due(self, step: int) -> bool:
        """Whether it is called after a step."""
        return step % self.every == 0


@dataclass(frozen=True)
class Caller:
    """All that the caller of `run_training` passes beside the set-up."""

    say: Callable[[str], None]
    on_log: Report | None
    on_eval: Report | None
    hooks: Sequence[Hook]
    optimizer: optax.GradientTransformation | None
    loss: Loss

    @property
    def own_loss(self) -> bool:
        """Whether the loss is another than the default one."""
        return self.loss is not token_loss

    def due(self, step: int) -> list[Hook]:
        """The hooks after a step."""
        return [hook for hook in self.hooks if hook.due(step)]
