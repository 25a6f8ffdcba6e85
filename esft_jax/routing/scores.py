"""Expert scores of a task, and the files that carry them.

Gates are the router's, without its scale and its selection bias; those of experts that a token does
not choose are 0.

- `token` (ESFT eq. 7): the share of a layer's (token, expert) assignments that an expert serves. A
  layer's token scores sum to 1.
- `gate` (eq. 6): an expert's mean gate over all tokens. A layer's gate scores sum to the mean gate
  mass of its top-K experts. Only of routers that do not renormalise their gates.
- `gate_share`: the mean over all tokens of an expert's gate, divided by the sum of the token's
  gates. A layer's gate shares sum to 1. Of all routers.

These three follow from the routing alone. The others are measured where they are asked for
(`score_experts` says how), and divided by their sum over the layer, so that they sum to 1:

- `contribution`: the mean norm of what an expert adds to a layer's output.
- `contrast`: the token score over that of a general sample.
- `gate_taylor`: the mean of a gate times the derivative of the loss by it.
- `random`: exponential draws, which are uniform over all ways to divide 1 among the experts.

Letters: L MoE layers, E experts, T tokens, K experts per token.
"""

import dataclasses
import json
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Float64, Int64

from esft_jax.adapt.expert_config import layer_index
from esft_jax.errors import InputError
from esft_jax.files import checked, read_json, write_text_atomic
from esft_jax.routing.groups import count_together
from esft_jax.routing.log import ROUTING_FILE, RoutingLog, check_no_gap, find_logs, read_logs
from esft_jax.selection_config import FURTHER_METHODS, ScoreMethod

SCORE_METHODS: tuple[ScoreMethod, ...] = get_args(ScoreMethod)
# What the routing alone tells: all that there is in the reference's files.
ROUTING_METHODS = tuple(method for method in SCORE_METHODS if method not in FURTHER_METHODS)

SCORES_FILE = "scores.json"
SUMMARY_FILE = "summary.json"
_DECIMALS = 4
# Why scores of a method may not be there.
_UNKNOWN: dict[ScoreMethod, str] = {
    "gate": "these are gate shares, of a router that renormalises its gates; expected gate_share",
    "gate_share": "these are mean gates, which do not tell the shares; expected routing logs or "
    "scores that `score` has measured anew",
    **dict.fromkeys(
        FURTHER_METHODS, "was not measured; expected scores by `score` that score.methods names"
    ),
}
_WORDS: dict[ScoreMethod, str] = {
    "token": "token score",
    "gate": "gate score",
    "gate_share": "gate share",
    "contribution": "contribution",
    "contrast": "contrast",
    "gate_taylor": "gate-Taylor score",
    "random": "random score",
}


@dataclass(frozen=True)
class ExpertScores:
    """Scores of every routed expert, by some of the methods.

    Attributes:
        layers: Decoder layer indices of the rows, ascending.
        token: Token scores, one row per layer.
        gate: Gate scores, one row per layer; None of a router that renormalises.
        provenance: Where the scores come from (data, tokens, base model); JSON values only.
        routing: What they were counted from, or its beginning; only where `score_experts` or
            routing logs gave them.
        together: How many tokens chose both of two experts, if it is known; on the diagonal, how
            many chose one.
        gate_share: Gate shares, one row per layer; None where they are not known, which is only of
            routers that do not renormalise.
        contribution, contrast, gate_taylor, random: Scores by these methods, one row per layer;
            None where they were not measured.
    """

    layers: tuple[int, ...]
    token: Float64[np.ndarray, "L E"]
    gate: Float64[np.ndarray, "L E"] | None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    routing: RoutingLog | None = field(default=None, compare=False, repr=False)
    together: Int64[np.ndarray, "L E E"] | None = field(default=None, compare=False, repr=False)
    gate_share: Float64[np.ndarray, "L E"] | None = None
    contribution: Float64[np.ndarray, "L E"] | None = None
    contrast: Float64[np.ndarray, "L E"] | None = None
    gate_taylor: Float64[np.ndarray, "L E"] | None = None
    random: Float64[np.ndarray, "L E"] | None = None

    def __post_init__(self) -> None:
        layers = list(self.layers)
        if not layers or layers != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"scores: layers are {layers}; expected ascending indices from 0")
        if self.gate is None and self.gate_share is None:
            raise InputError("scores: neither gate scores nor gate shares; expected some")
        for method in self.methods:
            values = np.asarray(self.of(method), dtype=np.float64)
            object.__setattr__(self, method, values)
            if values.ndim != 2 or values.shape[0] != len(self.layers) or values.shape[1] == 0:
                raise InputError(
                    f"scores: {score_words(method)}s have shape {list(values.shape)};"
                    f" expected [{len(self.layers)} layers, experts]"
                )
            bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
            if bad.size:
                row, expert = (int(i) for i in bad[0])
                raise InputError(
                    f"scores: layer {self.layers[row]}, expert {expert}: {score_words(method)}"
                    f" {values[row, expert]} is not a finite number >= 0"
                )
            if values.shape != self.token.shape:
                raise InputError(
                    f"scores: {self.token.shape[1]} token scores but {values.shape[1]}"
                    f" {score_words(method)}s per layer; expected as many"
                )
        if self.together is not None and self.together.shape != (
            len(layers),
            self.num_experts,
            self.num_experts,
        ):
            raise InputError(
                f"scores: chosen_together has shape {list(self.together.shape)}; expected a number "
                "for each pair of experts of each layer"
            )
        tolerance = _tolerance(self.num_experts)
        for method in self.methods:
            if method == "gate":
                continue
            for layer, total in zip(self.layers, self.of(method).sum(axis=1), strict=True):
                # Gate shares have less where all gates of a token have vanished.
                least = 0.0 if method == "gate_share" else 1.0
                if not least - tolerance <= total <= 1 + tolerance:
                    raise InputError(
                        f"scores: layer {layer}: {score_words(method)}s sum to {total:.4f}, "
                        + ("to more than 1" if least < 1 else "not to 1")
                    )

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return self.token.shape[1]

    @property
    def methods(self) -> tuple[ScoreMethod, ...]:
        """Those by which there are scores."""
        return tuple(m for m in SCORE_METHODS if getattr(self, m) is not None)

    @property
    def gate_method(self) -> ScoreMethod:
        """Whose scores say how the router weighs experts: `gate`, or else `gate_share`."""
        return "gate_share" if self.gate is None else "gate"

    def of(self, method: ScoreMethod) -> Float64[np.ndarray, "L E"]:
        """The scores of one method.

        Raises:
            InputError: there are none.
        """
        found: Float64[np.ndarray, "L E"] | None = getattr(self, method)
        if found is None:
            raise InputError(f"method: {method}: {_UNKNOWN[method]}")
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `summary.json` (the reference's format) and `scores.json` (full precision).

        Their keys name the methods. A summary has those of the reference, token and gate scores;
        where there are no gate scores, gate shares stand in their place, under their own name.
        The routing, if it is known, goes to `routing.npz`.
        """
        summary = {_key(m): self._by_name(m) for m in ("token", self.gate_method)}
        scores: dict[str, Any] = {
            "layers": list(self.layers),
            **{_key(method): self.of(method).tolist() for method in self.methods},
            "provenance": dict(self.provenance),
        }
        if self.together is not None:
            scores["chosen_together"] = self.together.tolist()
        # Not beside new scores, even if writing these ends half-way.
        (Path(folder) / ROUTING_FILE).unlink(missing_ok=True)
        write_text_atomic(Path(folder) / SUMMARY_FILE, json.dumps(summary))
        if self.routing is not None:
            self.routing.save(folder)
        # Last: whoever finds scores.json may rely on all files.
        write_text_atomic(Path(folder) / SCORES_FILE, json.dumps(scores))

    def _by_name(self, method: ScoreMethod) -> dict[str, dict[str, float]]:
        rows = dict(zip(self.layers, round_scores(self.of(method)).tolist(), strict=True))
        return {
            str(layer): {str(expert): score for expert, score in enumerate(rows[layer])}
            for layer in sorted(self.layers, key=str)  # the reference's order: "1", "10", "11", ...
        }


def _key(method: ScoreMethod) -> str:
    """In files."""
    return f"{method}_scores"


def score_words(method: ScoreMethod) -> str:
    """A score of a method, for messages: `token score`, `gate share`."""
    return _WORDS[method]


def _tolerance(num_experts: int) -> float:
    """Of the sum of a layer's scores: rounding moves each by at most half of the last digit."""
    return 1e-3 + num_experts * 0.5 * 10**-_DECIMALS


def _told_apart(gate: Float64[np.ndarray, "L E"]) -> dict[str, Float64[np.ndarray, "L E"] | None]:
    """Mean gates of some router, as `gate` and `gate_share` of `ExpertScores`.

    Those that sum to 1 in every layer are of a router that renormalises, and shares.
    """
    if (np.abs(gate.sum(axis=1) - 1) <= _tolerance(gate.shape[1])).all():
        return {"gate": None, "gate_share": gate}
    return {"gate": gate, "gate_share": None}


def round_scores(scores: Float[np.ndarray, "L E"]) -> Float64[np.ndarray, "L E"]:
    """Round to the reference's 4 decimals, exactly as decimal printing does (np.round does not)."""
    rounded = [[round(score, _DECIMALS) for score in row] for row in scores.tolist()]
    return np.array(rounded, dtype=np.float64)


def load_scores(path: str | os.PathLike[str], *, experts_per_token: int = 6) -> ExpertScores:
    """Read scores from whatever holds them.

    Files that do not say whether their gate scores are shares are told apart by the sums of layers.
    Layers of a `summary.json` in which every score is 0, as published ones have for multi-token
    prediction, are left out with a warning: no token was routed there.

    Args:
        path: A folder with our `scores.json`, with reference routing logs
            (`expert_weights_{layer}.txt`) or with a reference `summary.json`, tried in this order;
            or one such JSON file.
        experts_per_token: K of routing logs, which do not say it themselves.

    Raises:
        InputError: Nothing is found, or the content is malformed (named by file, line and key).
    """
    path = Path(path)
    if path.is_dir():
        logs = find_logs(path)
        if (path / SCORES_FILE).exists():
            path = path / SCORES_FILE
        elif logs:
            return _of_logs(read_logs(logs, experts_per_token))
        elif (path / SUMMARY_FILE).exists():
            path = path / SUMMARY_FILE
        else:
            raise InputError(
                f"{path}: no scores in this folder; expected {SCORES_FILE}, {SUMMARY_FILE}"
                " or expert_weights_<layer>.txt"
            )
    content = read_json(path)
    gates = {_key("gate"), _key("gate_share")}
    if (
        not isinstance(content, dict)
        or _key("token") not in content
        or gates.isdisjoint(content.keys())
    ):
        raise InputError(
            f"{path}: expected a JSON object with the keys token_scores, and gate_scores or "
            "gate_share_scores"
        )
    try:
        return _from_scores(content, path) if "layers" in content else _from_summary(content, path)
    except InputError as error:
        raise (
            error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")
        ) from None


def _from_scores(content: dict[str, Any], path: Path) -> ExpertScores:
    layers, provenance = content["layers"], content.get("provenance", {})
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise InputError(f"{path}: layers: expected a list of decoder layer indices")
    if not isinstance(provenance, dict):
        raise InputError(f"{path}: provenance: expected an object")
    tables: dict[ScoreMethod, Float64[np.ndarray, "L E"]] = {}
    for method in SCORE_METHODS:
        key = _key(method)
        if key not in content:
            continue
        rows = content[key]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise InputError(f"{path}: {key}: expected a list of rows, one per layer")
        if len(rows) != len(layers):
            raise InputError(f"{path}: {key}: {len(rows)} rows for {len(layers)} layers")
        named = {layer: dict(enumerate(row)) for layer, row in zip(layers, rows, strict=True)}
        tables[method] = _table(named, f"{path}: {key}")
    together = content.get("chosen_together")
    if together is not None:
        where = f"{path}: chosen_together"
        try:
            together = np.array(checked(list[list[list[int]]], together, where), np.int64)
        except InputError:
            raise
        except (ValueError, OverflowError):
            raise InputError(f"{where}: expected whole numbers, as many for each expert") from None
        if (together < 0).any():
            raise InputError(f"{path}: chosen_together: expected numbers from 0")
    return _of_tables(tuple(layers), tables, provenance, together)


def _of_tables(
    layers: tuple[int, ...],
    tables: Mapping[ScoreMethod, Float64[np.ndarray, "L _"]],
    provenance: dict[str, Any],
    together: Int64[np.ndarray, "L E E"] | None = None,
) -> ExpertScores:
    """Scores by method, as a file has them; before there were gate shares, none had them."""
    every: dict[Any, Any] = dict(tables)
    if "gate_share" not in tables:
        every |= _told_apart(tables["gate"])
    every.setdefault("gate", None)
    return ExpertScores(layers, provenance=provenance, together=together, **every)


def _from_summary(content: dict[str, Any], path: Path) -> ExpertScores:
    found: dict[ScoreMethod, dict[int, dict[int, Any]]] = {}
    for method in ROUTING_METHODS:
        key, where = _key(method), f"{path}: {_key(method)}"
        if key not in content:
            continue
        if not isinstance(content[key], dict):
            raise InputError(f"{where}: expected an object of layer -> {{expert: score}}")
        rows = found[method] = {}
        for layer, row in content[key].items():
            if not isinstance(row, dict):
                raise InputError(f"{where}.{layer}: expected an object of expert -> score")
            missing = {str(expert) for expert in range(len(row))} - row.keys()
            if missing:
                raise InputError(f"{where}.{layer}: no score of expert {min(missing, key=int)}")
            rows[layer_index(layer, where)] = {n: row[str(n)] for n in range(len(row))}
    every = {layer for rows in found.values() for layer in rows}
    empty = {
        layer
        for layer in every
        if all(score == 0 for rows in found.values() for score in rows.get(layer, {0: 0}).values())
    }
    if empty:
        named = ", ".join(map(str, sorted(empty)))
        warnings.warn(f"{path}: every score of layer {named} is 0; left out", stacklevel=2)
    layers = sorted(every - empty)
    tables = {}
    for method, rows in found.items():
        kept = {layer: rows[layer] for layer in layers if layer in rows}
        tables[method] = _table(kept, f"{path}: {_key(method)}")
    for layer in layers:
        if any(layer not in rows for rows in found.values()):
            raise InputError(f"{path}: layer {layer} has token or gate scores only; expected both")
    check_no_gap(layers, str(path))
    provenance = {"source": "reference summary", "decimals": _DECIMALS}
    return _of_tables(tuple(layers), tables, provenance)


def _table(rows: dict[int, dict[int, Any]], where: str) -> Float64[np.ndarray, "L E"]:
    """Stack one row per layer, checking that each is as long and every score is a number."""
    if not rows:
        raise InputError(f"{where}: no layers")
    first, width = next((layer, len(row)) for layer, row in rows.items())
    for layer, row in rows.items():
        if len(row) != width:
            raise InputError(
                f"{where}: layer {layer} has {len(row)} experts, layer {first} has {width};"
                " expected as many"
            )
        for expert, score in row.items():
            if not isinstance(score, int | float) or isinstance(score, bool):
                raise InputError(
                    f"{where}: layer {layer}, expert {expert}: {reprlib.repr(score)} is no number"
                )
    try:
        return np.array([list(row.values()) for row in rows.values()], dtype=np.float64)
    except OverflowError:
        raise InputError(f"{where}: a score is beyond the range of floating point") from None


def as_wide(loaded: Sequence[ExpertScores], num_experts: int | None = None) -> list[ExpertScores]:
    """What `load_scores` has read, with `num_experts` in each layer where logs show fewer.

    Logs do not say how many there are: the last ones are missing if no token chose them. Where
    nothing else does, it is the most of any.
    """
    if num_experts is None:
        num_experts = max((scores.num_experts for scores in loaded), default=0)
    return [
        _of_logs(dataclasses.replace(scores.routing, num_experts=num_experts))
        if scores.routing is not None and scores.num_experts < num_experts
        else scores
        for scores in loaded
    ]


def _of_logs(log: RoutingLog) -> ExpertScores:
    ids = log.expert_ids.reshape(len(log.layers), -1)
    counts = [np.bincount(row, minlength=log.num_experts) for row in ids]

    def mean(gates: Float[np.ndarray, "L T K"]) -> Float64[np.ndarray, "L E"]:
        rows = zip(ids, gates.reshape(ids.shape), strict=True)
        sums = [np.bincount(*row, minlength=log.num_experts) for row in rows]
        return np.stack(sums) / log.num_tokens

    gates = _told_apart(mean(log.gates))
    if gates["gate_share"] is None:
        gates["gate_share"] = mean(log.shares)
    provenance = {
        "source": "reference routing logs",
        "tokens": log.num_tokens,
        "sequences": log.num_sequences,
        "experts_per_token": log.top_k,
    }
    return ExpertScores(
        layers=log.layers,
        token=np.stack(counts) / (log.top_k * log.num_tokens),
        **gates,
        provenance=provenance,
        routing=log,
        together=np.stack([count_together(row, log.num_experts) for row in log.expert_ids]),
    )
