"""What a run trains, by its method."""

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.config import LoRAConfig, Method
from esft_jax.model.config import ModelConfig


def trained_by(
    method: Method, lora: LoRAConfig, model: ModelConfig, experts: ExpertConfig | None
) -> Trained:
    """Every parameter (`full`), selected experts (`esft`), or low-rank updates (`lora`).

    Args:
        lora: read with `method: lora` alone.
        experts: the selected ones, where the method selects any.

    Raises:
        InputError: see `LoRA.on`.
    """
    match method:
        case "full":
            return None
        case "esft":
            assert experts is not None, "esft selects experts"
            return experts
    return LoRA.on(model, lora.rank, lora.alpha, lora.targets, experts)
