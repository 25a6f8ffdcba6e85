"""The torch contenders of `train_step.py`: models of `transformers` with two kinds of experts.

`modules`: one module per expert, as the published code has them. Frozen experts have no gradients,
so ESFT needs nothing else. The loop over experts is written for speed: one sort, no scatter-add.

`grouped_mm`: the fused experts of `transformers` with its fastest implementation for a CPU. All
experts of a layer are one parameter there, so ESFT trains small tensors of the selected experts
and copies them into the frozen parameter in every step.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Measured, run_steps
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar


class Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor):
        super().__init__()
        self.gate, self.up = (nn.Parameter(half.clone()) for half in gate_up.chunk(2))
        self.down = nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        return F.linear(hidden, self.down)


class ExpertModules(nn.Module):
    """A loop over the experts that any token chose."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        pairs = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        self.experts = nn.ModuleList(Expert(*pair) for pair in pairs)

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.flatten()
        order = chosen.argsort()
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        groups = x[order // top_k_index.shape[1]].split(counts)
        out = torch.cat(
            [expert(rows) for expert, rows in zip(self.experts, groups, strict=True) if len(rows)]
        )
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return (out[place].view(*top_k_index.shape, -1) * top_k_weights[..., None]).sum(dim=1)


class MergedExperts(nn.Module):
    """Frozen fused experts, some of which are replaced by trained tensors of their own."""

    def __init__(self, fused: nn.Module, selected: list[int]):
        super().__init__()
        self.fused = fused.requires_grad_(False)
        self.selected = torch.tensor(selected)
        self.tuned = nn.ParameterDict(
            {name: nn.Parameter(bank[self.selected]) for name, bank in fused.named_parameters()}
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        merged = {
            name: bank.index_copy(0, self.selected, self.tuned[name])
            for name, bank in self.fused.named_parameters()
        }
        return torch.func.functional_call(self.fused, merged, inputs)


def load(folder: Path, kind: str, method: str) -> PreTrainedModel:
    """The model, with gradients for what the method trains."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    selected = None
    if method.startswith("esft"):
        path = folder / f"experts-{method.removeprefix('esft-')}.json"
        selected = json.loads(path.read_text())["experts"]
    model.requires_grad_(method == "full")
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        if kind == "modules":
            layer.mlp.experts = ExpertModules(layer.mlp.experts).requires_grad_(method == "full")
            for expert in selected[str(index)] if selected else ():
                layer.mlp.experts.experts[expert].requires_grad_(True)
        elif selected:
            layer.mlp.experts = MergedExperts(layer.mlp.experts, selected[str(index)])
    return model


def make_optimizer(model: nn.Module, config: dict[str, float]) -> torch.optim.Optimizer:
    """AdamW in one fused pass; vectors, as the scales of norms, are not decayed."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[decayed], "weight_decay": config["weight_decay"] if decayed else 0.0}
            for decayed in groups
            if groups[decayed]
        ],
        lr=config["learning_rate"],
        betas=(config["beta1"], config["beta2"]),
        eps=config["epsilon"],
        fused=True,
    )


def measure(
    folder: Path,
    kind: str,
    method: str,
    optimizer_config: dict[str, float],
    warmup: int,
    steps: int,
    threads: int,
) -> Measured:
    """Run a method: `forward`, `full`, or `esft-{share}`, with experts of this kind."""
    torch.set_num_threads(threads)
    model = load(folder, kind, method).train(method != "forward")
    with np.load(folder / "batches.npz") as stored:
        tokens, targets = (torch.from_numpy(stored[key]).long() for key in ("tokens", "targets"))

    def loss(index: int) -> Tensor:
        index %= len(tokens)
        logits = model(tokens[index], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets[index].flatten())

    if method == "forward":

        @torch.no_grad()
        def evaluate(index: int) -> tuple[float, None]:
            return loss(index).item(), None

        return run_steps(evaluate, warmup, steps)

    optimizer = make_optimizer(model, optimizer_config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def update(index: int) -> tuple[float, float]:
        value = loss(index)
        value.backward()
        norm = nn.utils.clip_grad_norm_(trained, optimizer_config["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return value.item(), norm.item()

    return run_steps(update, warmup, steps)
