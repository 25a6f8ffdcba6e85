"""What kernels should give, and their gradients, in float64 on the host: NumPy, nothing of JAX.

Each function returns the result and the gradients of `sum(result * cotangent)`.

Letters: N rows, G groups, D and F the sides of a matrix; B rows of tokens, S of them in each, T
tokens; H heads of queries or values, K heads of keys, R and W features of a key and of a value, P
taps; V words.
"""

from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Integer

Array64 = Float[np.ndarray, "..."]

# Of MXFP4, without the sign (OCP Microscaling Formats 1.0).
_MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def dequantised(
    codes: Integer[np.ndarray, "P F"],
    scales: Float[np.ndarray, "G F"],
    scheme: str,
    group_size: int,
) -> Float[np.ndarray, "D F"]:
    """What codes and scales stand for; see `ops.quantised.Quantised`."""
    if scheme == "int8":
        values = codes.astype(np.float64)
    elif scheme == "fp8":
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        nibbles = np.concatenate([codes & 15, codes >> 4]).astype(np.int64)
        if scheme == "int4":
            values = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float64)
        else:
            values = _MXFP4[nibbles & 7] * np.where(nibbles > 7, -1, 1)
    return values * np.repeat(scales.astype(np.float64), group_size, axis=0)[: len(values)]


def grouped_products(
    x: Float[np.ndarray, "N D"],
    matrices: Mapping[int, Float[np.ndarray, "D F"]],
    rows: Mapping[int, slice],
    width: int,
    cotangent: Float[np.ndarray, "N F"],
) -> tuple[Array64, Array64, dict[int, Array64]]:
    """Each group's rows times its matrix, zeros elsewhere; gradients of the rows, and of the
    matrices of groups that have rows.

    Args:
        matrices, rows: of the groups that have rows, by their number.
    """
    out = np.zeros((len(x), width))
    dx = np.zeros(x.shape)
    dmatrices = {}
    for group, part in rows.items():
        matrix, inputs = matrices[group].astype(np.float64), x[part].astype(np.float64)
        given = cotangent[part].astype(np.float64)
        out[part] = inputs @ matrix
        dx[part] = given @ matrix.T
        dmatrices[group] = inputs.T @ given
    return out, dx, dmatrices


def attention(
    query: Float[np.ndarray, "B S H R"],
    key: Float[np.ndarray, "B S K R"],
    value: Float[np.ndarray, "B S K W"],
    sinks: Float[np.ndarray, " H"] | None,
    segment_ids: Int[np.ndarray, "B S"],
    scale: float,
    window: int | None,
    cotangent: Float[np.ndarray, "B S H W"],
) -> dict[str, Array64]:
    """Causal softmax attention within segments, and gradients `query`, `key`, `value`, `sinks`."""
    length, shared = query.shape[1], query.shape[2] // key.shape[2]
    distance = np.arange(length)[:, None] - np.arange(length)
    near = (distance >= 0) & (distance < (window or length))
    found = {
        "result": np.zeros(cotangent.shape),
        "query": np.zeros(query.shape),
        "key": np.zeros(key.shape),
        "value": np.zeros(value.shape),
        "sinks": np.zeros(query.shape[2]),
    }
    for row, head in np.ndindex(len(query), query.shape[2]):
        one, of = (row, slice(None), head), (row, slice(None), head // shared)
        q, k, v = (a.astype(np.float64) for a in (query[one], key[of], value[of]))
        given = cotangent[one].astype(np.float64)
        visible = near & (segment_ids[row][:, None] == segment_ids[row])
        scores = np.where(visible, q @ k.T * scale, -np.inf)
        sink = -np.inf if sinks is None else float(sinks[head])
        top = np.maximum(scores.max(axis=1), sink)[:, None]
        weights = np.exp(scores - top)
        of_sink = np.exp(sink - top)
        total = weights.sum(axis=1, keepdims=True) + of_sink
        weights /= total
        out = weights @ v
        mean = (given * out).sum(axis=1, keepdims=True)
        dscores = weights * (given @ v.T - mean) * scale
        found["result"][one] = out
        found["query"][one] = dscores @ k
        found["key"][of] += dscores.T @ q
        found["value"][of] += weights.T @ given
        found["sinks"][head] -= (of_sink / total * mean).sum()
    if sinks is None:
        del found["sinks"]
    return found


def cross_entropy(
    hidden: Float[np.ndarray, "B S D"],
    head: Float[np.ndarray, "D V"],
    targets: Int[np.ndarray, "B S"],
    weights: Float[np.ndarray, "B S"],
    cap: float | None,
) -> dict[str, Array64]:
    """Weighted losses of each row of tokens, and gradients of their sum: `hidden`, `head`."""
    size, width = hidden.shape[-1], head.shape[1]
    inputs, words = hidden.reshape(-1, size).astype(np.float64), targets.reshape(-1)
    every = np.arange(len(inputs))
    logits = np.empty((len(inputs), width))
    parts = list(_columns(width))
    for part in parts:  # never the whole head in float64
        logits[:, part] = inputs @ head[:, part].astype(np.float64)
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    top = logits.max(axis=1, keepdims=True)
    exps = np.exp(logits - top)
    sums = exps.sum(axis=1, keepdims=True)
    weight = weights.reshape(-1, 1).astype(np.float64)
    losses = weight[:, 0] * (np.log(sums) + top)[:, 0] - weight[:, 0] * logits[every, words]
    dlogits = weight * exps / sums
    dlogits[every, words] -= weight[:, 0]
    if cap is not None:
        dlogits *= 1 - (logits / cap) ** 2
    dhidden, dhead = np.zeros(inputs.shape), np.empty(head.shape)
    for part in parts:
        dhidden += dlogits[:, part] @ head[:, part].astype(np.float64).T
        dhead[:, part] = inputs.T @ dlogits[:, part]
    by_row = losses.reshape(targets.shape).sum(axis=1)
    return {"result": by_row, "hidden": dhidden.reshape(hidden.shape), "head": dhead}


def _columns(width: int, size: int = 8192) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, width, size))


def convolution(
    x: Float[np.ndarray, "B S D"],
    weight: Float[np.ndarray, "P D"],
    segment_ids: Int[np.ndarray, "B S"],
    cotangent: Float[np.ndarray, "B S D"],
) -> dict[str, Array64]:
    """A causal convolution of each feature within segments, and gradients `x`, `weight`."""
    x, weight, cotangent = (a.astype(np.float64) for a in (x, weight, cotangent))
    out, dx, dweight = np.zeros(x.shape), np.zeros(x.shape), np.zeros(weight.shape)
    length, taps = x.shape[1], len(weight)
    for tap in range(min(taps, length)):  # how many tokens ago
        now, then = slice(tap, length), slice(0, length - tap)
        same = (segment_ids[:, now] == segment_ids[:, then])[..., None]
        of = taps - 1 - tap
        out[:, now] += weight[of] * np.where(same, x[:, then], 0)
        given = np.where(same, cotangent[:, now], 0)
        dx[:, then] += weight[of] * given
        dweight[of] = (given * x[:, then]).sum(axis=(0, 1))
    return {"result": out, "x": dx, "weight": dweight}


def delta_rule(
    query: Float[np.ndarray, "B S K R"],
    key: Float[np.ndarray, "B S K R"],
    value: Float[np.ndarray, "B S H W"],
    decay: Float[np.ndarray, "B S H"],
    beta: Float[np.ndarray, "B S H"],
    segment_ids: Int[np.ndarray, "B S"],
    eps: float,
    cotangent: Float[np.ndarray, "B S H W"],
) -> dict[str, Array64]:
    """The gated delta rule, a token after the other (see `ops.delta_rule`), and the gradients
    `query`, `key`, `value`, `decay`, `beta`.

    Args:
        eps: added to the squared lengths of queries and keys.
    """
    shared = value.shape[2] // key.shape[2]
    operands = {"query": query, "key": key, "value": value, "decay": decay, "beta": beta}
    found = {name: np.zeros(a.shape) for name, a in operands.items()}
    found["result"] = np.zeros(value.shape)
    for row, head in np.ndindex(len(key), key.shape[2]):
        tokens = np.flatnonzero(segment_ids[row])  # padding leaves the state alone
        heads = slice(head * shared, (head + 1) * shared)
        q, k = (_unit(a[row, tokens, head].astype(np.float64), eps) for a in (query, key))
        one = _OneHead(
            q[0] * query.shape[3] ** -0.5,
            k[0],
            value[row, tokens, heads].astype(np.float64),
            decay[row, tokens, heads].astype(np.float64),
            beta[row, tokens, heads].astype(np.float64),
            segment_ids[row][tokens],
        )
        results = one.run(cotangent[row, tokens, heads].astype(np.float64))
        for name in ("result", "value", "decay", "beta"):
            found[name][row, tokens, heads] = results[name]
        of_query = results["query"] * query.shape[3] ** -0.5
        found["query"][row, tokens, head] = _unit_gradient(*q, of_query)
        found["key"][row, tokens, head] = _unit_gradient(*k, results["key"])
    return found


def _unit(x: Float[np.ndarray, "T R"], eps: float) -> tuple[Array64, Array64]:
    """Vectors over their lengths, and the reciprocals of these."""
    factors = 1 / np.sqrt((x**2).sum(axis=1, keepdims=True) + eps)
    return x * factors, factors


def _unit_gradient(unit: Array64, factors: Array64, grad: Array64) -> Array64:
    return factors * (grad - unit * (unit * grad).sum(axis=1, keepdims=True))


class _OneHead:
    """A key head and the J value heads that share it, over the tokens of a row."""

    def __init__(
        self,
        query: Float[np.ndarray, "T R"],
        key: Float[np.ndarray, "T R"],
        value: Float[np.ndarray, "T J W"],
        decay: Float[np.ndarray, "T J"],
        beta: Float[np.ndarray, "T J"],
        documents: Int[np.ndarray, " T"],
    ):
        self.query, self.key, self.value, self.beta = query, key, value, beta
        begins = np.append(True, documents[1:] != documents[:-1])
        # A document begins with an empty state.
        self.kept = np.where(begins[:, None], 0, np.exp(decay))

    def run(self, cotangent: Float[np.ndarray, "T J W"]) -> dict[str, Array64]:
        """What is read, and the gradients."""
        count, heads, width = self.value.shape
        state = np.zeros((heads, self.key.shape[1], width))
        faded, wrong = [], []
        out = np.empty(self.value.shape)
        for t in range(count):
            state = self.kept[t][:, None, None] * state
            faded.append(state)
            wrong.append(self.value[t] - self.key[t] @ state)
            state = state + self._correction(t, wrong[t])
            out[t] = self.query[t] @ state
        grads = {
            "query": np.empty(self.query.shape),
            "key": np.empty(self.key.shape),
            "value": np.empty(self.value.shape),
            "decay": np.empty(self.beta.shape),
            "beta": np.empty(self.beta.shape),
        }
        dstate = np.zeros(state.shape)
        for t in reversed(range(count)):
            q, k, given = self.query[t], self.key[t], cotangent[t]
            correction = self.beta[t][:, None] * wrong[t]
            after = faded[t] + self._correction(t, wrong[t])
            grads["query"][t] = np.einsum("jrw,jw->r", after, given)
            dstate = dstate + q[:, None] * given[:, None]
            dcorrection = k @ dstate
            grads["beta"][t] = (dcorrection * wrong[t]).sum(axis=1)
            grads["value"][t] = dvalue = self.beta[t][:, None] * dcorrection
            grads["key"][t] = np.einsum("jrw,jw->r", dstate, correction)
            grads["key"][t] -= np.einsum("jrw,jw->r", faded[t], dvalue)
            dstate = dstate - k[:, None] * dvalue[:, None]
            grads["decay"][t] = (faded[t] * dstate).sum(axis=(1, 2))
            dstate = self.kept[t][:, None, None] * dstate
        return grads | {"result": out}

    def _correction(self, t: int, wrong: Float[np.ndarray, "J W"]) -> Array64:
        """What a token adds to the states, `[J, R, W]`."""
        return self.key[t][:, None] * (self.beta[t][:, None] * wrong)[:, None]


def rows_of(sizes: Iterable[int], starts: Iterable[int]) -> dict[int, slice]:
    """The rows of groups that have some, by the number of the group."""
    both = enumerate(zip(starts, sizes, strict=True))
    return {group: slice(start, start + size) for group, (start, size) in both if size}
