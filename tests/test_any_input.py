"""Whatever anybody passes: each argument of each op, option of an optimizer and entry of its state is replaced by
values of other kinds, one at a time, and the outcome is torch's: the same error, type and text, or the same numbers
(L3, G1, A1, O1)."""

import copy
import decimal
import fractions

import numpy
import pytest
import torch
import torch.nn.functional as TF
from common import HALF, outcome, served, thresholds
from test_linear_gelu import torchs_linear_gelu
from torch.utils._pytree import tree_leaves, tree_map

import nnfast.nn.functional as F
from nnfast import optim
from nnfast.nn.utils import clip_grad

pytestmark = [pytest.mark.usefixtures("some_kernels"), pytest.mark.filterwarnings("ignore")]


class Mine(torch.Tensor):
    pass


def inference(t):
    with torch.inference_mode():
        return t.detach().clone()


# What may stand in a tensor's place.
TENSORS = {
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "mkldnn": lambda t: t.detach().to_mkldnn() if t.dtype is torch.float32 and t.dim() else None,
    "quantized": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t.detach(), t.detach()]),
    "no elements": lambda t: t.flatten()[:0] if t.dim() < 2 else t[:0],
    "no dimension": lambda t: t.flatten()[0],
    "a dimension more": lambda t: t[None],
    "two more": lambda t: t[None, None],
    "one dimension": lambda t: t.flatten(),
    "less": lambda t: t[..., :-1] if t.dim() else None,
    "more": lambda t: torch.stack([t, t]) if t.dim() == 0 else torch.cat([t, t], -1),
    "more rows": lambda t: torch.stack([t, t]) if t.dim() == 0 else torch.cat([t, t]),
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "turned": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() else t,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "negative": lambda t: torch.complex(t, -t).conj().imag if t.is_floating_point() else -t,
    "mine": lambda t: t.detach().as_subclass(Mine),
    "parameter": lambda t: torch.nn.Parameter(t.detach(), requires_grad=t.is_floating_point()),
    "buffer": lambda t: torch.nn.Buffer(t.detach()),
    "gradient": lambda t: t.detach().clone().requires_grad_(t.is_floating_point()),
    "frozen": lambda t: t.detach(),
    "inference": inference,
}
# What may stand in the place of anything else.
OTHERS = {
    "none": None,
    "text": "mean",
    "other text": "tanh",
    "no such text": "average",
    "0": 0,
    "1": 1,
    "-1": -1,
    "2.5": 2.5,
    "true": True,
    "large": 2**70,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "float32": numpy.float32(0.25),
    "float64": numpy.float64(0.25),
    "int64": numpy.int64(1),
    "fraction": fractions.Fraction(1, 4),
    "decimal": decimal.Decimal("0.25"),
    "tensor": torch.tensor(0.25),
    "count": torch.tensor(1),
    "two": torch.tensor([1, 2]),
    "gradient": torch.tensor(0.25, requires_grad=True),
    "mine": torch.tensor(0.25).as_subclass(Mine),
    "tuple": (8,),
    "list": [8],
    "size": torch.Size([6, 8]),
    "text in a tuple": ("8",),
    "tensor in a tuple": (torch.tensor(8),),
    "pair": (0.5, 0.75),
    "object": object(),
}


def arguments():
    """Of each op: ours, torch's, its arguments by name."""
    torch.manual_seed(0)
    x, wide, w, b = torch.randn(5, 6, 8), torch.randn(7, 8), torch.randn(8), torch.randn(8)
    x, wide, w, b = (t.requires_grad_() for t in (x, wide, w, b))
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    logits, target = torch.randn(6, 9, requires_grad=True), torch.randint(9, (6,))
    loss = {"target": target, "weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
    linear = {"input": x, "weight": wide, "bias": torch.randn(7, requires_grad=True)}
    return {
        "layer_norm": (
            TF.layer_norm,
            {"input": x, "normalized_shape": (8,), "weight": w, "bias": b, "eps": 1e-5},
        ),
        "gelu": (TF.gelu, {"input": x, "approximate": "none"}),
        "linear": (TF.linear, linear),
        "linear_gelu": (torchs_linear_gelu, {**linear, "approximate": "none"}),
        "cross_entropy": (TF.cross_entropy, {"input": logits, **loss}),
        "embedding": (
            TF.embedding,
            {"input": target, "weight": torch.randn(9, 8, requires_grad=True), "padding_idx": 0}
            | {"max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False},
        ),
        "scaled_dot_product_attention": (
            TF.scaled_dot_product_attention,
            {"query": q, "key": k, "value": v, "attn_mask": torch.randn(5, 5), "dropout_p": 0.0}
            | {"is_causal": False, "scale": 0.3, "enable_gqa": False},
        ),
        "linear_cross_entropy": (
            getattr(TF, "linear_cross_entropy", None),
            {"input": torch.randn(6, 8, requires_grad=True), "linear_weight": torch.randn(9, 8, requires_grad=True)}
            | {"target": target, "reduction": "mean", "label_smoothing": 0.1, "ignore_index": -100},
        ),
    }


def replaced(values):
    """(name and kind, values with one of them replaced), for each value and whatever may stand in its place."""
    for name, value in values.items():
        for kind, other in TENSORS.items() if isinstance(value, torch.Tensor) else OTHERS.items():
            try:
                other = other(value) if isinstance(value, torch.Tensor) else copy.copy(other)
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                continue  # there is no such tensor
            yield f"{name}: {kind}", {**values, name: other}


def with_gradients(function, values, by_position=3):
    """The output and its gradients; the first arguments by position, which torch's errors name."""

    def call():
        torch.manual_seed(0)
        leaves = [t for t in values.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        output = function(*list(values.values())[:by_position], **dict(list(values.items())[by_position:]))
        if not leaves or not output.requires_grad:
            return output
        return [output, *torch.autograd.grad(output.sum(), leaves, allow_unused=True)]

    return call


def plain(t):
    """The values, where the tensor has any, in float64."""
    if t.is_nested:
        t = torch.cat([u.flatten() for u in t.unbind()])
    return (t.dequantize() if t.is_quantized else t.detach().to_dense()).double()


def assert_same(ours, torchs, what):
    """Of errors, type and text; of tensors, values to a few roundings (how near they are is for other tests)."""
    if isinstance(torchs, tuple) or isinstance(ours, tuple):
        assert ours == torchs, what
    elif isinstance(torchs, list):
        assert len(ours) == len(torchs), what
        for a, b in zip(ours, torchs, strict=True):
            assert_same(a, b, what)
    elif torchs is None:
        assert ours is None, what
    else:
        assert (type(ours), ours.dtype, ours.device, ours.layout) == (
            (type(torchs), torchs.dtype, torchs.device, torchs.layout)
        ), what
        assert torchs.is_nested or ours.shape == torchs.shape, what
        if not torchs.is_meta and torchs.numel():
            ours, torchs = plain(ours), plain(torchs)
            size = max([1.0, *torchs[torchs.isfinite()].abs().tolist()])
            few = 2**-6 if "bfloat16" in what else 2**-20
            torch.testing.assert_close(
                ours, torchs, rtol=0, atol=few * size, equal_nan=True, msg=lambda m: f"{what}\n{m}"
            )


# How many arguments' positions torch's errors name.
NAMED = {"gelu": 1, "linear": 3, "scaled_dot_product_attention": 3}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [name for name, (theirs, _) in arguments().items() if theirs])
def test_any_argument(name, autocast):
    theirs, values = arguments()[name]
    ours = getattr(F, name)
    with thresholds(embedding__table_bytes=0), served(name):
        ours(**values)
    for what, given in replaced(values):
        if what == "scale: large":
            continue  # the softmax of one number is 1, and its gradient noise times 2 ** 70
        with thresholds(embedding__table_bytes=0), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = [outcome(with_gradients(function, given, NAMED.get(name, 0))) for function in (ours, theirs)]
        assert_same(*results, what + " bfloat16" * autocast)


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("name", [name for name, (theirs, _) in arguments().items() if theirs])
def test_a_gradient_that_is_not_there(name):
    """Whoever reads the output may give it none, and what comes before then gets none, or zeros, as from torch."""
    theirs, values = arguments()[name]
    results = []
    for function in (getattr(F, name), theirs):
        with thresholds(embedding__table_bytes=0):
            output = Nothing.apply(function(**values))
            leaves = [t for t in values.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            output = output.sum() + sum(t.sum() * 0 for t in leaves)
            results.append(list(torch.autograd.grad(output, leaves, allow_unused=True)))
    assert_same(*results, name)


OPTIONS = {
    "AdamW": {"amsgrad": True},
    "Adam": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True},
}


def begun(optimizer_class, options):
    """An optimizer of two parameters after a step, and gradients for the next."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    optimizer = optimizer_class(params, lr=0.1, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(3, 4)
        if not optimizer.state:
            optimizer.step()
    return optimizer, params


def after_a_step(name, spoil, fused=False):
    """What a step gives after ``spoil(optimizer, first parameter)``, with nnfast's and with torch's loop: the error, or
    parameters and state. ``fused``: of ours, torch's fused kernel was asked for."""
    results = []
    for module in (optim, torch.optim):
        optimizer, params = begun(getattr(module, name), {**OPTIONS[name], "foreach": False})
        if fused and module is optim:
            optimizer.param_groups[0]["fused"] = True
        whole = [*params, *(t for t in optimizer.state[params[1]].values() if isinstance(t, torch.Tensor))]
        before = [t.detach().clone() for t in whole]
        spoil(optimizer, params[0])
        result = outcome(optimizer.step)
        if module is optim and isinstance(result, tuple):
            same = all(torch.equal(a, b) for a, b in zip(whole, before, strict=True))
            assert same, f"half a step: {spoil.__defaults__} {result}"
        if result is None:
            states = [optimizer.state[p] for p in params]
            result = [p.detach() for p in params]
            result += [v for s in states for v in s.values() if isinstance(v, torch.Tensor)]
        results.append(result)
    return results


@pytest.mark.parametrize("name", OPTIONS)
def test_any_option(name):
    group = begun(getattr(torch.optim, name), OPTIONS[name])[0].param_groups[0]
    with served(getattr(optim, name)._op):
        begun(getattr(optim, name), OPTIONS[name])
    for key in group:
        if key == "params":
            continue

        def delete(optimizer, p, key=key):
            del optimizer.param_groups[0][key]

        assert_same(*after_a_step(name, delete), f"no {key}")
        for kind, other in OTHERS.items():
            if key == "alpha" and kind == "0":
                continue  # the variance of one gradient is 0, and of torch's, too, rounding is all that is left

            def replace(optimizer, p, key=key, other=other):
                optimizer.param_groups[0][key] = other

            assert_same(*after_a_step(name, replace), f"{key}: {kind}")


@pytest.mark.parametrize("name", OPTIONS)
def test_any_state(name):
    optimizer, params = begun(getattr(torch.optim, name), OPTIONS[name])
    with served(getattr(optim, name)._op):
        begun(getattr(optim, name), OPTIONS[name])
    for key in optimizer.state[params[0]]:

        def delete(optimizer, p, key=key):
            del optimizer.state[p][key]

        assert_same(*after_a_step(name, delete), f"no {key}")
        for kind, other in TENSORS.items():

            def replace(optimizer, p, key=key, other=other):
                optimizer.state[p][key] = other(optimizer.state[p][key])

            assert_same(*after_a_step(name, replace), f"{key}: {kind}")


def expanded_gradient(optimizer, p):
    p.grad = torch.autograd.grad(p.sum(), p)[0]
    optimizer.param_groups[0]["weight_decay"] = False


def expanded_state(optimizer, p):
    key = "momentum_buffer" if "momentum_buffer" in optimizer.state[p] else "exp_avg"
    optimizer.state[p][key] = optimizer.state[p][key][:1].expand_as(p)


def numpys_numbers(optimizer, p):
    optimizer.param_groups[0]["lr"] = numpy.float32(0.1)
    p.grad = p.grad.t().contiguous().t()


@pytest.mark.parametrize("spoil", [expanded_gradient, expanded_state, numpys_numbers])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_torchs_fused_kernel_is_never_tried_where_it_is_wrong(name, spoil):
    """It takes all tensors for dense, and would write past their ends; not on copies either."""
    with served(getattr(optim, name)._op):
        begun(getattr(optim, name), OPTIONS[name])
    assert_same(*after_a_step(name, spoil, fused=True), f"{name} {spoil.__name__}")


CLIPPING = ("get_total_norm", "clip_grad_norm_", "clip_grads_with_norm_")


@pytest.mark.parametrize("name", CLIPPING)
def test_any_clipping(name):
    """Its numbers and, where the function takes tensors, each of them; and each list of them."""

    def parameters():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 40)]
        for p in params:
            p.grad = torch.randn_like(p)
        return params

    def given():
        params = parameters()
        if name == "get_total_norm":
            return {"tensors": [p.grad for p in params], "norm_type": 2.0, "error_if_nonfinite": False, "foreach": None}
        if name == "clip_grads_with_norm_":
            return {"parameters": params, "max_norm": 1.0, "total_norm": torch.tensor(7.0), "foreach": None}
        return {"parameters": params, "max_norm": 1.0, "norm_type": 2.0, "error_if_nonfinite": False, "foreach": None}

    def results(change):
        for module in (clip_grad, torch.nn.utils):
            values = given()
            params = values.get("parameters", [])
            change(values)

            def call(module=module, values=values, params=params):
                output = getattr(module, name)(**values)
                return [output, *(p.grad for p in params)]

            yield outcome(call)

    with served("total_norm" if name != "clip_grads_with_norm_" else "scale_"):
        getattr(clip_grad, name)(**given())
    for key, value in given().items():
        for kind, other in TENSORS.items() if isinstance(value, torch.Tensor) else OTHERS.items():

            def replace(values, key=key, other=other):
                values[key] = other(values[key]) if isinstance(values[key], torch.Tensor) else other

            assert_same(*results(replace), f"{key}: {kind}")
    for kind, other in TENSORS.items() if name == "get_total_norm" else ():

        def replace_first(values, other=other):
            values["tensors"][0] = other(values["tensors"][0])

        assert_same(*results(replace_first), f"first: {kind}")


def calls():
    """A call of each op of ours: its name and its arguments, in order."""
    torch.manual_seed(0)
    x, wide, bias = torch.randn(5, 6, 8), torch.randn(7, 8), torch.randn(7)
    w, b, g, pre = torch.randn(8), torch.randn(8), torch.randn(5, 6, 8), torch.randn(5, 6, 7)
    q, k, v, mask = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(5, 5)
    logits, target, weight = torch.randn(6, 9), torch.randint(9, (6,)), torch.rand(9)
    input, linear_weight, linear_bias = torch.randn(6, 8), torch.randn(9, 8), torch.randn(9)
    ops = torch.ops.nnfast
    every, loss = (True, True, True), (1, -100, 0.1)
    stats = ops.layer_norm(x, (8,), w, b, 1e-5)[1]
    attended = ops.scaled_dot_product_attention(q, k, v, mask)
    of_loss = ops.cross_entropy(logits, target, weight, *loss)[1]
    return {
        "layer_norm": (x, (8,), w, b, 1e-5),
        "layer_norm_backward": (g, x, (8,), stats, w, b, every),
        "gelu": (x,),
        "gelu_backward": (g, x),
        "gelu_backward_sum": (g, x),
        "gelu_linear_backward": (pre, wide, g),
        "linear": (x, wide, bias),
        "linear_backward": (pre, x, wide, every),
        "linear_gelu": (x, wide, bias),
        "cross_entropy": (logits, target, weight, *loss),
        "cross_entropy_backward": (torch.tensor(2.0), logits, of_loss, target, weight, *loss),
        "cross_entropy_backward_": (torch.tensor(2.0), logits, of_loss, target, weight, *loss),
        "linear_cross_entropy": (input, linear_weight, target, linear_bias, weight, *loss),
        "linear_cross_entropy_backward": (
            (torch.tensor(2.0), input, linear_weight, target, linear_bias, weight, *loss, every)
        ),
        "embedding": (linear_weight, target, 1, True),
        "scaled_dot_product_attention": (q, k, v, mask, False),
        "scaled_dot_product_attention_backward": (torch.randn_like(q), q, k, v, mask, *attended, False),
        "total_norm": ([x, w], 2.0),
        "scale_": ([x, w], 0.5),
        "scale_by_": ([x, w], torch.tensor(0.5)),
        "clip_coef": ([x, w], 1.0, torch.tensor(2.0)),
    }


def own_copies(args):
    """The same values in tensors that lie as torch makes them."""
    return tree_map(lambda t: t.detach().clone().contiguous() if isinstance(t, torch.Tensor) else t, args)


STEPS = ["adamw_", "rmsprop_", "sgd_"]
# Every other op that the extension has: a new one needs a call here.
OPS = {schema.name.removeprefix("nnfast::") for schema in torch._C._jit_get_all_schemas() if "nnfast::" in schema.name}
OPS = sorted(OPS - {*STEPS})


@pytest.mark.parametrize("name", OPS)
def test_any_call_of_an_op(name):
    """An op that anybody can call refuses what does not fit it, or gives what it gives for contiguous copies; in place
    too. `make sanitize` sees whether it reads beyond an end."""
    op, args = getattr(torch.ops.nnfast, name), calls()[name]
    keywords = {"output_mask": (True, True, True)} if name == "scaled_dot_product_attention_backward" else {}

    def results(given):
        changed = tree_map(lambda t: t, given)
        outcome_ = outcome(lambda: op(*changed, **keywords))
        if isinstance(outcome_, tuple) and isinstance(outcome_[0], type):
            assert issubclass(outcome_[0], (RuntimeError, TypeError, ValueError, IndexError)), outcome_
            return outcome_
        tensors = [t for t in tree_leaves([outcome_, changed]) if isinstance(t, torch.Tensor)]
        return [t if t.is_floating_point() else None for t in tensors]

    served_at_all = 0
    for i, value in enumerate(args):
        several = isinstance(value, list)
        tensor = value[0] if several else value
        for kind, other in TENSORS.items() if isinstance(tensor, torch.Tensor) else OTHERS.items():
            if kind in ("mine", "parameter", "buffer", "gradient", "inference"):
                continue
            try:
                other = other(tensor.clone()) if isinstance(tensor, torch.Tensor) else other
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                continue
            given = [*own_copies(args[:i]), [other, *own_copies(value[1:])] if several else other]
            given += own_copies(args[i + 1 :])
            if not all(t.layout is torch.strided for t in tree_leaves(given) if isinstance(t, torch.Tensor)):
                copies = given  # what is sparse stays so
            else:
                copies = own_copies(given)
            ours = results(given)
            if isinstance(ours, list):
                assert_same(ours, results(copies), f"{name} {i}: {kind}")
                served_at_all += 1
    assert served_at_all > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_any_call_of_a_step(name, dtype):
    """Of one parameter: whatever its tensors are, the op refuses before anything is changed, or does what it does to
    contiguous copies."""
    lists = {"adamw_": 6, "sgd_": 3, "rmsprop_": 5}[name]
    numbers = {
        "adamw_": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8},
        "sgd_": {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1},
        "rmsprop_": {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "centered": True},
    }[name]
    torch.manual_seed(0)
    values = [torch.rand(6, 8).to(dtype) for _ in range(lists)] + [torch.tensor(3.0)] * (name != "sgd_")
    if name == "adamw_":
        values[5] = torch.zeros(6, 8, dtype=torch.int16)

    def result(given, **extra):
        given = [[t] for t in given]
        if name == "adamw_" and dtype is not torch.bfloat16:
            given[5] = []  # there are no masters
        error = outcome(lambda: getattr(torch.ops.nnfast, name)(*given, **numbers, **extra))
        return error if error is not None else [t.clone() for kind in given for t in kind]

    taken = 0
    for i, value in enumerate(values):
        for kind, other in TENSORS.items():
            try:
                other = other(value.clone())
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                continue
            # An op that has no kernel of autograd's is refused by torch after its call.
            if not isinstance(other, torch.Tensor) or other.requires_grad or other.is_meta or other.is_inference():
                continue
            if other.is_nested or other.layout is not torch.strided:
                with pytest.raises((RuntimeError, NotImplementedError)):
                    given = [*own_copies(values[:i]), other, *own_copies(values[i + 1 :])]
                    getattr(torch.ops.nnfast, name)(*[[t] for t in given], **numbers)
                continue
            given = [*own_copies(values[:i]), other, *own_copies(values[i + 1 :])]
            before = [t.detach().clone() for t in given]
            ours = result(given)
            if isinstance(ours, list):
                assert_same(ours, result(own_copies(before)), f"{name} {i}: {kind} {dtype}")
                taken += 1
            else:
                assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), f"{name} {i}: {kind}"
    assert taken > 1
    if name != "rmsprop_":
        for key in ("grad_scale", "found_inf"):
            assert isinstance(result(own_copies(values), **{key: torch.ones(2)}), tuple)
        found = result(own_copies(values), found_inf=torch.tensor(1.0))
        assert_same(found, [t for k, t in enumerate(values) if k != 5 or name != "adamw_" or dtype in HALF], name)
        whole = result([values[0].clone(), values[1] * 4, *own_copies(values[2:])], grad_scale=torch.tensor(4.0))
        assert_same(whole[0], result(own_copies(values))[0], f"{name} {dtype}")
        turned = values[1].t().contiguous().t()
        given = [values[0].clone(), turned, *own_copies(values[2:])]
        assert isinstance(result(given, grad_scale=torch.tensor(4.0)), tuple)
    for lr in (torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)):
        assert_same(result(own_copies(values), tensor_lr=lr)[0], result(own_copies(values))[0], name)
    assert isinstance(result(own_copies(values), tensor_lr=torch.ones(2)), tuple)
