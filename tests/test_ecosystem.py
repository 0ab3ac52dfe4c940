"""Libraries that take a model and an optimizer apart: an accelerated one trains in them to torch's numbers.

Configurations are tiny and random; nothing is downloaded. A package that is not there is the one reason to skip:
`pip install -e .[dev]` brings them all.
"""

import copy
import functools
import os
import warnings

import pytest
import torch
from user_models import MLP, Block, Function, LayerNorm

import nnfast
from nnfast.backend import native

os.environ["HF_HUB_OFFLINE"] = "1"


def package(name):
    return pytest.importorskip(name, reason=f"the dev extra of pyproject.toml brings {name}")


def gpt2(**kwargs):
    t = package("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, **ends, **dropout, **kwargs))


def hf(name, head, **kwargs):
    t = package("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return getattr(t, name + head)(getattr(t, name + "Config")(**sizes, **kwargs))


def x_transformer():
    package("x_transformers")
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=Decoder(dim=16, depth=2, heads=2))


def tokens(rows=2, columns=9):
    ids = torch.randint(0, 50, (rows, columns))
    return {"input_ids": ids, "labels": ids}


def loss_of(model, inputs):
    output = model(**inputs)
    return output.loss if hasattr(output, "loss") else output.square().mean()


# The model, its inputs, and how many Linears get their bias's gradient summed by the GELU that reads them.
MODELS = {
    "GPT-2": (gpt2, tokens, 2),
    "GPT-2, erf": (lambda: gpt2(activation_function="gelu"), tokens, 2),
    "GPT-2, quick": (lambda: gpt2(activation_function="quick_gelu"), tokens, 0),
    "BERT": (lambda: hf("Bert", "ForMaskedLM", vocab_size=50), tokens, 3),
    "BERT, fast": (lambda: hf("Bert", "ForMaskedLM", vocab_size=50, hidden_act="gelu_fast"), tokens, 3),
    "ViT": (
        lambda: hf("ViT", "ForImageClassification", image_size=16, patch_size=8, hidden_act="gelu_pytorch_tanh"),
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])},
        2,
    ),
    "Llama": (lambda: hf("Llama", "ForCausalLM", vocab_size=50), tokens, 0),
    "Llama, GELU": (lambda: hf("Llama", "ForCausalLM", vocab_size=50, hidden_act="gelu"), tokens, 0),
    "x-transformers": (x_transformer, lambda: {"x": torch.randint(0, 50, (2, 9))}, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, inputs, sums = MODELS[name]
    model, inputs = make(), inputs()
    plain = copy.deepcopy(model)
    keys, text = list(model.state_dict()), repr(model)
    nnfast.accelerate(model)
    assert list(model.state_dict()) == keys and repr(model) == text
    results = []
    for m in (model, model, plain):
        m.zero_grad()
        torch.manual_seed(1)
        loss = loss_of(m, inputs)
        before = native.paths()["linear_backward.sums_found"]
        loss.backward()
        assert native.paths()["linear_backward.sums_found"] - before == (sums if m is model else 0)
        with torch.no_grad():
            evaluated = loss_of(m.eval(), inputs)
        results.append((loss.detach(), evaluated, [p.grad for p in m.parameters()]))
        m.train()
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)
    report = nnfast.report(model)
    norms = sum(isinstance(m, torch.nn.LayerNorm) for m in plain.modules())
    assert sum(what == "LayerNorm" for _, what in report.served) == norms
    assert [type(m) for m in nnfast.restore(model).modules()] == [type(m) for m in plain.modules()]


def attentions(model):
    return [name for name, what in nnfast.report(model).served if what == "scaled_dot_product_attention"]


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT", "Llama"])
def test_attention(name, cpu_kernels):
    """X1, X3: transformers' modules find ours by their own registry, and only while they ask for `sdpa`."""
    from common import served

    make, inputs, _ = MODELS[name]
    plain, inputs = make().eval(), inputs()
    model = nnfast.accelerate(nnfast.accelerate(copy.deepcopy(plain)))
    config = model.config
    assert len(attentions(model)) == 2 and config._attn_implementation == "sdpa" and config == plain.config
    assert not attentions(plain) and config.to_dict() == plain.config.to_dict()
    copied = copy.deepcopy(model)
    for m in (model, copied):
        with served("scaled_dot_product_attention", "scaled_dot_product_attention_backward"):
            losses = [loss_of(each, inputs) for each in (m, plain)]
            losses[0].backward()
        torch.testing.assert_close(*losses)
    owner = dict(copied.named_modules())[attentions(copied)[0]]
    assert owner.config.hidden_size == copied.config.hidden_size and owner.config == copied.config
    copied.config.some_choice = 3  # the copy's modules share its one config
    assert owner.config.some_choice == 3 and not hasattr(config, "some_choice")
    owner.config.other_choice = 4
    assert copied.config.other_choice == 4
    # A padded batch; another choice, made afterwards; and back.
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    padded = inputs | {"attention_mask": mask} if "input_ids" in inputs else inputs
    torch.testing.assert_close(loss_of(model, padded), loss_of(plain, padded))
    model.set_attn_implementation("eager")
    assert not attentions(model)
    output = model(**inputs, output_attentions=True)
    assert output.attentions[0].shape[:2] == (2, 2)
    model.set_attn_implementation("sdpa")
    assert len(attentions(model)) == 2
    nnfast.restore(model)
    assert not attentions(model) and all(m.config is config for m in model.modules() if hasattr(m, "config"))
    torch.testing.assert_close(loss_of(model, inputs), loss_of(plain, inputs))


def test_attention_of_modules_that_ask_for_sdpa(cpu_kernels):
    """X1: they add a mask of their own where their config says `sdpa`."""
    from common import served

    t = package("transformers")
    if not hasattr(t, "DeepseekV32Config"):
        pytest.skip("this version of transformers has no such model")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 8, "v_head_dim": 8}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "n_shared_experts": 1, "n_routed_experts": 4}
    experts = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_hidden_layers": 1, "pad_token_id": 0}
    index = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "max_position_embeddings": 64}
    config = t.DeepseekV32Config(**sizes, **heads, **ranks, **experts, **index)
    model, ids = t.AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 99, (1, 24))
    with torch.no_grad():
        expected = model(ids).logits
        nnfast.accelerate(model)
        assert attentions(model)
        with served("scaled_dot_product_attention"):
            torch.testing.assert_close(model(ids).logits, expected)


def test_a_module_sees_its_config(cpu_kernels):
    """X3: copies are copies, and whoever registers another `sdpa` later is heard."""
    package("transformers")
    from transformers import AttentionInterface

    from nnfast import sdpa

    model = nnfast.accelerate(gpt2())
    seen = dict(model.named_modules())[attentions(model)[0]].config
    copied = copy.copy(seen)
    copied.some_choice = 3
    assert not hasattr(model.config, "some_choice") and seen._attn_implementation in ("eager", "sdpa")
    seen.some_choice = 4
    del seen.some_choice
    assert not hasattr(model.config, "some_choice")
    calls = []
    try:
        AttentionInterface.register("sdpa", lambda *args, **kwargs: calls.append(1) or sdpa._theirs(*args, **kwargs))
        loss_of(model, tokens())
    finally:
        AttentionInterface.register("sdpa", sdpa._theirs)
    assert len(calls) == 2


@pytest.mark.torch_serves("no attention of ours")
def test_attention_that_is_not_sdpa():
    model = nnfast.accelerate(gpt2(attn_implementation="eager"))
    assert not attentions(model) and not any("takes it" in why for _, why in nnfast.report(model).left)


def test_dropout_of_attention_is_torchs():
    """S1: the same numbers from the same generator."""
    plain = hf("Bert", "ForMaskedLM", vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model, inputs, losses = nnfast.accelerate(copy.deepcopy(plain)), tokens(), []
    for m in (model, plain):
        torch.manual_seed(2)
        losses.append(loss_of(m.train(), inputs))
    torch.testing.assert_close(*losses)


def both(make, train):
    """What `train(model, AdamW)` gives, with an accelerated model and our optimizer, and with torch's.

    With an eps at which a gradient that is nothing but rounding (a key's bias has one) moves nothing.
    """
    torch.manual_seed(0)
    plain = make()
    model = nnfast.accelerate(copy.deepcopy(plain))
    results = []
    for m, adamw in ((model, nnfast.optim.AdamW), (plain, torch.optim.AdamW)):
        torch.manual_seed(1)
        results.append(train(m, functools.partial(adamw, eps=1e-3)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    return model


def values(model):
    return [p.detach().float() for p in model.parameters()]


def test_hf_trainer(tmp_path):
    t = package("transformers")
    package("accelerate")
    torch.use_deterministic_algorithms(False)  # the Trainer sets what it needs
    data = [{k: v[0] for k, v in tokens(1).items()} for _ in range(8)]

    def train(model, adamw):
        arguments = t.TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=3,
            dataloader_pin_memory=False,
        )
        optimizer = adamw(model.parameters(), lr=1e-3)
        trainer = t.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        again = type(model).from_pretrained(tmp_path / "checkpoint-3")
        torch.testing.assert_close(again.state_dict(), model.state_dict())
        return values(model)

    both(gpt2, train)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_hf_accelerate(mixed_precision):
    accelerate = package("accelerate")

    def train(model, adamw):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        model, optimizer = accelerator.prepare(model, adamw(model.parameters(), lr=1e-3))
        losses = []
        for _ in range(3):
            loss = model(torch.randn(2, 3, 8)).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        nnfast.restore(accelerator.unwrap_model(model))
        # In bf16, AdamW's first steps are all of the size of lr, whichever way a rounded gradient points.
        return losses[:2] if mixed_precision == "bf16" else (losses, values(model))

    both(Block, train)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = package("lightning")
    torch.use_deterministic_algorithms(False)

    class Lit(lightning.LightningModule):
        def __init__(self, model, adamw):
            super().__init__()
            self.model, self.adamw, self.seen = model, adamw, []

        def training_step(self, batch, _):
            return self.model(batch).square().mean()

        def validation_step(self, batch, _):
            self.seen.append(self.model(batch).square().mean())

        def configure_optimizers(self):
            optimizer = self.adamw(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]

    data = torch.randn(4, 2, 3, 8)
    batches = [torch.utils.data.DataLoader(d, batch_size=None) for d in (data, data[:1])]

    def train(model, adamw):
        lit = Lit(model, adamw)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(lit, *batches)
        trainer.validate(lit, batches[1], verbose=False)
        assert lit.seen[-1].is_inference()
        return [s.clone() for s in lit.seen], values(model)

    both(Block, train)


def test_peft():
    peft = package("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_fc", "c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    inputs = tokens()

    def train(model, adamw):
        adapted = peft.get_peft_model(model, config)
        if adamw.func is nnfast.optim.AdamW:
            nnfast.accelerate(adapted)  # again, from outside the wrapper
        optimizer = adamw([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            adapted(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            adapted_loss = adapted(**inputs).loss
            merged = adapted.merge_and_unload()
            return adapted_loss, merged(**inputs).loss, values(merged)

    both(gpt2, train)


def test_grad_scaler_and_autocast():
    def train(model, adamw):
        optimizer, scaler = adamw(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**8)
        losses = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.ones(2, 3, 8)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
        # bfloat16 keeps three digits.
        return (torch.stack(losses) * 32).round() / 32, scaler.get_scale()

    both(Block, train)


def test_activation_checkpointing():
    def train(model, adamw):
        model.gradient_checkpointing_enable()
        model.train()
        loss = model(**tokens()).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    both(gpt2, train)


def test_averaged_model():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    def train(model, adamw):
        optimizer, average = (
            adamw(model.parameters(), lr=0.1),
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
        )
        for _ in range(3):
            model(torch.randn(2, 3, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        return values(average), average(torch.ones(2, 3, 8)).detach()

    both(Block, train)


def test_compiled_training_compiles_once():
    """Dynamic shapes and a learning rate that changes at every step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counts = []

    def train(model, adamw):
        torch._dynamo.reset()  # what was compiled for one model is tried for the other
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
        optimizer = adamw(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        count = []
        for rows in (5, 6, 7, 9):
            count.append(counter.frame_count)
            compiled(torch.randn(rows, 3, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        counts.append([*count, counter.frame_count])
        return values(model)

    torch._dynamo.reset()
    both(lambda: torch.nn.Sequential(LayerNorm(8), MLP(), Function()), train)
    ours, theirs = counts
    assert ours == theirs and ours[0] == 0 and len({*ours[1:]}) == 1, counts


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.torch_serves("an exported graph has torch's ops")
def test_export(strict):
    plain, x = Block().eval(), torch.randn(2, 3, 8)
    model = nnfast.accelerate(copy.deepcopy(plain))
    dynamic = {"x": {0: torch.export.Dim("batch", min=2)}}
    ours, theirs = (torch.export.export(m, (x,), dynamic_shapes=dynamic, strict=strict) for m in (model, plain))
    assert [str(n.target) for n in ours.graph.nodes] == [str(n.target) for n in theirs.graph.nodes]
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(ours.module()(x), plain(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.torch_serves("an exported graph has torch's ops")
def test_onnx():
    onnx = package("onnx")
    package("onnxscript")
    from onnx.reference import ReferenceEvaluator

    plain, x = torch.nn.Sequential(torch.nn.LayerNorm(8), MLP(gelu=torch.nn.GELU("tanh"))).eval(), torch.randn(2, 3, 8)
    model = nnfast.accelerate(copy.deepcopy(plain))
    graphs = [torch.onnx.export(m, (x,), dynamo=True, verbose=False).model_proto for m in (model, plain)]
    onnx.checker.check_model(graphs[0])
    assert [n.op_type for n in graphs[0].graph.node] == [n.op_type for n in graphs[1].graph.node]
    (y,) = ReferenceEvaluator(graphs[0]).run(None, {graphs[0].graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.torch_serves("functorch sees torch's ops")
def test_torch_func():
    """Per-sample gradients and a jacobian of an accelerated model."""
    plain = torch.nn.Sequential(torch.nn.LayerNorm(8), MLP())
    model, x = nnfast.accelerate(copy.deepcopy(plain)), torch.randn(3, 8)
    results = []
    for m in (model, plain):
        parameters = {k: v.detach() for k, v in m.named_parameters()}

        def loss(parameters, row, m=m):
            return torch.func.functional_call(m, parameters, (row,)).square().sum()

        per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append((per_sample, torch.func.jacrev(m)(x), torch.func.jvp(m, (x,), (x,))))
    torch.testing.assert_close(*results)
