"""What quant/billm and quant/binary expect: number by number in exact fractions, with explicit elimination of H^-1."""

from dataclasses import dataclass
from fractions import Fraction

from refllm.evaluate.golden.suites.exact import Unclear, f16_margin, to_f16, to_f32
from refllm.evaluate.golden.suites.gptq_definition import hessian, inverse

MARGIN = Fraction(1, 1000)
Rows = list[list[Fraction]]


@dataclass(frozen=True)
class Definition:
    """The op quant.billm with its params."""

    block: int = 128
    damp: float = 0.0
    by: str = "hessian"
    search: str = "importance"


def residual(row: list[Fraction], places: list[int], order: int) -> tuple:
    """Mean, scales, {place: signs}, error of the numbers at some places of a row."""
    rest, total, scales = {c: row[c] for c in places}, Fraction(0), []
    signs: dict[int, list[int]] = {c: [] for c in places}
    for _ in range(order):
        mean = sum(rest.values(), Fraction(0)) / max(len(rest), 1)
        scale = sum((abs(v - mean) for v in rest.values()), Fraction(0)) / max(len(rest), 1)
        total, scales = total + mean, [*scales, scale]
        for c, v in rest.items():
            signs[c].append(int(v >= mean))
            rest[c] = v - mean - (scale if v >= mean else -scale)
    return total, scales, signs, sum((v**2 for v in rest.values()), Fraction(0))


def clear_best(errors: list[Fraction], options: list) -> int:
    """The least error; refused where another option is nearly as good."""
    best = errors.index(min(errors))
    others = [e for e, o in zip(errors, options, strict=True) if o != options[best]]
    if others and min(others) <= errors[best] * (1 + MARGIN):
        raise Unclear
    return best


def groups_of(S: Rows, M: Rows) -> tuple[list[int], list[list[int]]]:
    """Salient columns of a block, and the far places of every row."""
    n, sums = len(M[0]), [sum(abs(row[c]) for row in S) for c in range(len(M[0]))]
    ranked = sorted(range(n), key=lambda c: (-sums[c], c))
    left = lambda places, order: sum(residual(row, places, order)[-1] for row in M)
    counts = list(range(1, min(49, n) + 1))
    salient = ranked[: counts[clear_best([left(ranked[:k], 2) + left(ranked[k:], 2) for k in counts], counts)]]
    others = [c for c in range(n) if c not in salient]
    size = [[Fraction(0) if c in salient else abs(v) for c, v in enumerate(row)] for row in M]
    ordered = sorted(v for row in size for v in row)
    splits, errors = [], []
    for k in range(10, 91):
        whole, part = divmod((len(ordered) - 1) * k, 100)
        if part == 0:
            raise Unclear
        p = ordered[whole] + (ordered[whole + 1] - ordered[whole]) * Fraction(part, 100)
        far = [[c for c in others if row[c] >= p] for row in size]
        near = [[c for c in others if row[c] < p] for row in size]
        splits.append(far)
        pairs = zip(M, near, far, strict=True)
        errors.append(sum(residual(row, a, 1)[-1] + residual(row, b, 1)[-1] for row, a, b in pairs))
    return salient, splits[clear_best(errors, splits)]


def quantize(w, x, d: Definition) -> dict:
    """The op quant.billm: {output: (dtype, nested)}."""
    W = [[Fraction(v) for v in row] for row in w]
    columns = len(W[0])
    H = hessian([[Fraction(v) for v in row] for row in x])
    for j in range(columns):
        if H[j][j] == 0:
            H[j][j] = Fraction(1)
            for row in W:
                row[j] = Fraction(0)
    add = Fraction(d.damp) * sum(H[j][j] for j in range(columns)) / columns
    A = inverse([[H[i][j] + (add if i == j else 0) for j in range(columns)] for i in range(columns)])
    shares, squares = [], []  # U_jk / U_jj and U_jj^2
    for j in range(columns):
        pivot = list(A[j])
        squares.append(pivot[j])
        shares.append([v / pivot[j] for v in pivot])
        for m in range(j + 1, columns):
            A[m] = [v - pivot[m] * p / pivot[j] for v, p in zip(A[m], pivot, strict=True)]
    planes = [[[0] * columns for _ in W] for _ in range(3)]
    signs, second, w_hat = planes
    salient, means, scales = [0] * columns, [[] for _ in W], [[] for _ in W]
    for a in range(0, columns, d.block):
        b = min(a + d.block, columns)
        now = [row[a:b] for row in W]
        S = [[v**2 / q for v, q in zip(row, squares[a:b], strict=True)] for row in now] if d.by == "hessian" else now
        chosen, far = groups_of(S, S if d.search == "importance" else now)
        for c in chosen:
            salient[a + c] = 1
        for r, row in enumerate(now):
            near = [c for c in range(b - a) if c not in chosen and c not in far[r]]
            fits = [residual(row, places, order) for places, order in ((near, 1), (far[r], 1), (chosen, 2))]
            mean, scale = [f[0] for f in fits], [s for f in fits for s in f[1]]
            if min(f16_margin(v) for v in (*mean, *scale)) < MARGIN:
                raise Unclear
            mean, scale = [to_f16(v) for v in mean], [to_f16(v) for v in scale]
            means[r].append(list(map(float, mean)))
            scales[r].append(list(map(float, scale)))
            for g, (_, _, of_place, _) in enumerate(fits):
                for c, bits in of_place.items():
                    q = to_f32(mean[g] + (scale[g] if bits[0] else -scale[g]))
                    if g == 2:
                        q = to_f32(q + (scale[3] if bits[1] else -scale[3]))
                    signs[r][a + c], second[r][a + c] = bits[0], bits[1] if g == 2 else int(g == 1)
                    w_hat[r][a + c] = float(q)
                    for k in range(b, columns):
                        W[r][k] -= (row[c] - q) * shares[a + c][k]
    return {"signs": ("u8", signs), "second": ("u8", second), "salient": ("u8", salient), "mean": ("f16", means),
            "scale": ("f16", scales), "w_hat": ("f32", w_hat)}  # fmt: skip


def quantize_binary(w, group_size: int) -> dict:
    """The op quant.binary: {output: (dtype, nested)}."""
    columns = len(w[0])
    g = columns if group_size < 0 else group_size
    signs, step, least, w_hat = [], [], [], []
    for row in w:
        row = [Fraction(v) for v in row]
        fits = [residual(row, list(range(a, a + g)), 1) for a in range(0, columns, g)]
        exact = [(2 * s, m - s) for m, (s,), _, _ in fits]
        if min(f16_margin(v) for pair in exact for v in pair) < MARGIN:
            raise Unclear
        pairs = [(to_f16(s), to_f16(m)) for s, m in exact]
        bits = [fits[c // g][2][c][0] for c in range(columns)]
        signs.append(bits)
        step.append([float(s) for s, _ in pairs])
        least.append([float(m) for _, m in pairs])
        w_hat.append([float(to_f32(pairs[c // g][0] * bits[c] + pairs[c // g][1])) for c in range(columns)])
    return {"codes": ("u8", signs), "scale": ("f16", step), "minimum": ("f16", least), "w_hat": ("f32", w_hat)}
