"""Each objective equals its formula on plain forward passes, values and gradients."""

import math
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch.nn.functional import one_hot

from attacks.discovery.goal import Goal
from attacks.objectives.delta_cosine import DeltaCosine
from attacks.objectives.delta_projection import DeltaProjection
from attacks.objectives.hybrid import Hybrid
from attacks.objectives.probe import Probe
from attacks.objectives.steered_kl import SteeredKL
from attacks.objectives.target_nll import TargetNLL
from attacks.scoring import engine as engine_module
from attacks.scoring.engine import Engine
from attacks.searchers.candidates import random_triggers
from tests.attacks.words import seeded, some_vectors

TARGET = [300, 7, 311]
LAYERS, WEIGHTS = [1, 2], {1: 0.5, 2: 2.0}
KINDS = ["mean", "mellowmax", "cosine", "projection", "kl", "probe", "hybrid"]


def some_candidates(problem, count: int):
    return random_triggers(problem.permitted(problem.trigger_length), count, seeded(1))


def objectives(engine: Engine) -> dict:
    """One of each kind."""
    vectors = some_vectors()
    cosine = DeltaCosine.from_vectors(engine, vectors, LAYERS, WEIGHTS)
    kl = SteeredKL.from_vectors(engine, vectors, 2)
    return {
        "mean": TargetNLL(target_ids=TARGET),
        "mellowmax": TargetNLL(target_ids=TARGET, reduction="mellowmax", alpha=2.0),
        "cosine": cosine,
        "projection": DeltaProjection.from_vectors(engine, vectors, LAYERS, WEIGHTS),
        "kl": kl,
        "probe": Probe.from_vectors(engine, vectors, 2, seeded(), draws=8),
        "hybrid": Hybrid(a=cosine, b=kl, weight=0.3),
    }


def plain(model, problem, trigger, target=(), added: float | torch.Tensor = 0.0):
    """Logits and last residuals by layer of each prompt by itself, nothing cached, padded or stopped."""
    for row in problem.filled(trigger):
        embeds = model.get_input_embeddings()(torch.tensor([[*row, *target]])) + added
        output = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=False)
        yield output.logits[0], [hidden[0, -1] for hidden in output.hidden_states]


def formulas(model, problem, trigger, probe: Probe) -> dict[str, float]:
    """Every objective of one trigger, written out token by token and prompt by prompt."""
    full = plain(model, problem, trigger, TARGET)
    states = (plain(model, problem, trigger), plain(model, problem, ()))
    steered = plain(model, problem, (), added=some_vectors().theta[0])
    rows = []
    for (logits, _), (_, got), (_, clean), (_, wanted) in zip(full, *states, steered, strict=True):
        chances = logits.softmax(-1)[-len(TARGET) - 1 : -1]
        nll = [-math.log(chance[token]) for chance, token in zip(chances, TARGET, strict=True)]
        pairs = [(WEIGHTS[at] / 2.5, got[at] - clean[at], wanted[at] - clean[at]) for at in LAYERS]
        p, q = (model.lm_head(model.model.norm(hidden[2])).softmax(-1) for hidden in (wanted, got))
        odds = math.exp((got[2] - clean[2]) @ probe.weight.double() + probe.bias)
        rows.append(
            {
                "mean": sum(nll) / 3,
                "mellowmax": math.log(sum(math.exp(2 * x) for x in nll) / 3) / 2,
                "cosine": sum(-w * float(a @ b / a.norm() / b.norm()) for w, a, b in pairs),
                "projection": sum(-w * float(a @ b / b.norm() / b.norm()) for w, a, b in pairs),
                "kl": float((p * (p / q).log()).sum()),
                "probe": -math.log(odds / (1 + odds)),
            }
        )
    means = {kind: sum(row[kind] for row in rows) / len(rows) for kind in rows[0]}
    return means | {"hybrid": 0.7 * means["cosine"] + 0.3 * means["kl"]}


@pytest.mark.parametrize("which", ["problem", "mixed"])
def test_every_loss_equals_its_formula(model, which, request):
    problem = request.getfixturevalue(which)
    engine, candidates = Engine(model, problem, 2), some_candidates(problem, 3)
    made = objectives(engine)
    wanted = [formulas(model, problem, ids, made["probe"]) for ids in candidates.tolist()]
    for kind in KINDS:
        found = engine.losses(made[kind], candidates).tolist()
        assert found == pytest.approx([row[kind] for row in wanted], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_central_differences(model, mixed, kind):
    engine, candidates = Engine(model, mixed), some_candidates(mixed, 1)
    objective = objectives(engine)[kind]
    _, gradient = engine.gradient(objective, candidates)
    onehot = one_hot(candidates, len(mixed.allowed)).double()
    direction = torch.randn(onehot.shape, generator=seeded(2), dtype=torch.float64) * 0.1
    up, down = (objective(engine, onehot + sign * 1e-2 * direction).double().item() for sign in (1, -1))
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-3  # else the comparison below says nothing
    # Step 1e-2: RMSNorm and the objectives work in float32.
    assert (up - down) / 2e-2 == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_distributions_made_in_pieces_give_the_same_divergence(model, mixed, monkeypatch):
    engine, candidates = Engine(model, mixed), some_candidates(mixed, 4)
    kl = SteeredKL.from_vectors(engine, some_vectors(), 2)
    wanted, sizes, whole = (engine.losses(kl, candidates), *engine.gradient(kl, candidates)), [], engine_module.unembed

    def watched(model, hidden):
        sizes.append(len(hidden))
        return whole(model, hidden)

    monkeypatch.setattr(engine_module, "unembed", watched)
    monkeypatch.setattr(engine_module, "PIECE", 4 * len(mixed.allowed) * 3)
    for one, other in zip((engine.losses(kl, candidates), *engine.gradient(kl, candidates)), wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert max(sizes) == 3


def test_objectives_of_goals(model, problem):
    """The first 4 tokens of the behaviour, and the first vector at the layer before the last."""
    engine, vectors = Engine(model, problem), some_vectors()
    goal = Goal(behaviour="any", target_ids=(300, 7, 311, 12, 13), vectors=vectors)
    nll, cosine = TargetNLL(target_ids=(300, 7, 311, 12)), DeltaCosine.from_vectors(engine, vectors, [2])
    projection = DeltaProjection.from_vectors(engine, vectors, [2])
    at_depths = DeltaCosine.from_vectors(engine, vectors, [1, 2, 3])
    pairs = [
        (TargetNLL.from_goal(engine, goal), nll),
        (TargetNLL.from_goal(engine, goal, reduction="mellowmax"), replace(nll, reduction="mellowmax")),
        (DeltaCosine.from_goal(engine, goal), cosine),
        # Effects are compared behind the vector's own layer, here 0; depths are fractions of 3 layers.
        (DeltaCosine.from_goal(engine, goal, depths=(0.0, 0.7, 0.75, 1.0)), at_depths),
        (DeltaProjection.from_goal(engine, goal), projection),
        (SteeredKL.from_goal(engine, goal), SteeredKL.from_vectors(engine, vectors, 3)),
        (Probe.from_goal(engine, goal), Probe.from_vectors(engine, vectors[:1], 2, seeded())),
        (Hybrid.from_goal(engine, goal, weight=0.2), Hybrid(a=nll, b=cosine, weight=0.2)),
    ]
    candidates = some_candidates(problem, 4)
    for made, wanted in pairs:
        assert type(made) is type(wanted)
        torch.testing.assert_close(engine.losses(made, candidates), engine.losses(wanted, candidates))


def test_mellowmax_lies_between_mean_and_maximum(model, problem):
    engine, candidates = Engine(model, problem), some_candidates(problem, 4)

    def losses(**kwargs):
        return engine.losses(TargetNLL(target_ids=TARGET, **kwargs), candidates)

    soft, sharp = (losses(reduction="mellowmax", alpha=alpha) for alpha in (1e-3, 200.0))
    nll = -engine.target_logprobs(candidates, TARGET)
    torch.testing.assert_close(soft, nll.mean((1, 2)), rtol=1e-2, atol=0)
    torch.testing.assert_close(sharp, nll.amax(-1).mean(1), rtol=1e-3, atol=0)
    middle = losses(reduction="mellowmax")
    assert (soft < middle).all() and (middle < sharp).all()
    one = TargetNLL(target_ids=TARGET[:1], reduction="mellowmax", alpha=3.0)
    assert torch.allclose(engine.losses(one, candidates), engine.losses(replace(one, reduction="mean"), candidates))


def test_optimum_at_the_goal(model, mixed):
    engine, candidates = Engine(model, mixed), some_candidates(mixed, 6)
    clean = {2: engine.residuals(candidates[:1, :0], [2])[2][0].float()}
    delta = {2: engine.residuals(candidates[4:5], [2])[2][0].float() - clean[2]}
    losses = engine.losses(DeltaCosine(delta=delta, clean=clean), candidates)
    assert losses.argmin() == 4
    assert losses[4] == pytest.approx(-1, abs=1e-5)
    projection = DeltaProjection(delta=delta, clean=clean)
    assert engine.losses(projection, candidates[4:5]).item() == pytest.approx(-1, abs=1e-5)
    assert engine.losses(projection, candidates[:1, :0]).item() == pytest.approx(0, abs=1e-5)
    # Half as long a goal is reached twice over; a cosine does not see it.
    half = DeltaProjection(delta={2: delta[2] / 2}, clean=clean)
    assert engine.losses(half, candidates[4:5]).item() == pytest.approx(-2, abs=1e-5)
    steered = engine.logits(candidates[2:3], 3)[0].float().log_softmax(-1)
    losses = engine.losses(SteeredKL(steered_logprobs=steered, layer=3), candidates)
    assert losses.argmin() == 2
    assert losses[2] == pytest.approx(0, abs=1e-5)


def test_steered_prompts_are_the_goal(model, mixed):
    engine, vectors = Engine(model, mixed), some_vectors()
    wanted = {"cosine": -1.0, "projection": -1.0, "kl": 0.0}
    with vectors[:1].apply(model):
        steered = Engine(model, mixed)
    for kind, best in wanted.items():
        objective = objectives(engine)[kind]
        with vectors[:1].apply(model):
            loss = steered.losses(objective, torch.zeros(1, 0, dtype=torch.long)).item()
        assert loss == pytest.approx(best, abs=1e-4)


def test_probe_is_the_minimum_of_its_loss(model, problem):
    """The gradient of the regularised loss is zero, on states gathered by plain forward passes."""
    vectors, penalty = some_vectors(), 0.05
    probe = Probe.from_vectors(Engine(model, problem), vectors, 2, seeded(), draws=6, penalty=penalty)
    triggers = [[], *random_triggers(problem.permitted(2), 6, seeded()).tolist()]

    def effects(added):
        states = [torch.stack([h[2] for _, h in plain(model, problem, ids, added=added)]) for ids in triggers]
        return (torch.stack(states) - probe.clean).flatten(0, 1)

    high = torch.cat([effects(theta) for theta in vectors.theta])
    low = effects(0.0)
    assert (len(high), len(low)) == (2 * 7 * 4, 7 * 4)
    size = torch.cat([high, low]).square().sum(-1).mean().sqrt()
    weight = (probe.weight.double() * size).requires_grad_()
    bias = torch.tensor(probe.bias, dtype=torch.float64, requires_grad=True)
    sure = [torch.sigmoid(states / size @ weight + bias) for states in (high, low)]
    loss = -(sure[0].log().mean() + (1 - sure[1]).log().mean()) / 2 + penalty / 2 * weight.square().sum()
    assert loss < math.log(2)  # what no weights at all give
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-5


def test_flops_of_making_objectives(model, problem):
    engine, vectors = Engine(model, problem), some_vectors()
    block = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    head, prompts, behind = 2 * model.lm_head.weight.numel(), len(problem), len(problem.after[0])
    before = prompts * max(map(len, problem.before))
    empty = before + prompts * behind

    def spent(make, *args, **kwargs) -> float:
        start = engine.flops
        make(engine, vectors, *args, **kwargs)
        return engine.flops - start

    assert spent(DeltaCosine.from_vectors, [1, 2]) == pytest.approx(2 * 2 * block * empty)
    assert spent(SteeredKL.from_vectors, 2) == pytest.approx(2 * block * empty + head * prompts)
    # Clean and under each of 2 vectors: the empty slot, 8 triggers of 2 tokens; and each vector's prefix, to the end.
    drawn = 8 * prompts * (2 + behind)
    wanted = 3 * 2 * block * (empty + drawn) + 2 * 3 * block * before
    assert spent(Probe.from_vectors, 2, seeded(), draws=8) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda engine, vectors, layer: DeltaCosine.from_vectors(engine, vectors, [layer]),
        lambda engine, vectors, layer: DeltaProjection.from_vectors(engine, vectors, [layer]),
        SteeredKL.from_vectors,
        lambda engine, vectors, layer: Probe.from_vectors(engine, vectors, layer, seeded()),
    ],
)
def test_vectors_and_layers_that_do_not_fit(model, problem, make):
    engine, vectors = Engine(model, problem), replace(some_vectors(), source_layer=1)
    with pytest.raises(ValueError, match=r"got layers \[4\] but the vectors act from layer 1 on .* give 1 to 3"):
        make(engine, vectors, 4)
    with pytest.raises(ValueError, match=r"got layers \[0\] .* give 1 to 3"):
        make(engine, vectors, 0)
    with pytest.raises(ValueError, match="vectors have width 48 but the model has 32"):
        make(engine, replace(vectors, theta=torch.ones(1, 48)), 2)
    with pytest.raises(ValueError, match="from layer 1 to 9 but the model has 3 layers"):
        make(engine, replace(vectors, target_layer=9), 2)
    with pytest.raises(ValueError, match="got 0 steering vectors; give at least one"):
        make(engine, vectors[:0], 2)


def test_errors(model, problem, monkeypatch):
    engine, vectors = Engine(model, problem), some_vectors()
    settings: Any = {"target_ids": TARGET, "reduction": "sum"}
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="reduction is 'sum'; use 'mean' or 'mell"):
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users' types are not checked
        TargetNLL(**settings)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"alpha is {alpha}; it must be positive and finite"):
            TargetNLL(target_ids=TARGET, alpha=alpha)
    with pytest.raises(ValueError, match=r"weight is 2.0; it must lie in \[0, 1\]"):
        Hybrid(a=TargetNLL(target_ids=[1]), b=TargetNLL(target_ids=[1]), weight=2.0)
    with pytest.raises(ValueError, match=r"got layers \[\] .* give 0 to 3"):
        DeltaCosine.from_vectors(engine, vectors, [])
    for weights in ({1: 0.0}, {3: 1.0}):
        with pytest.raises(ValueError, match=r"weights are .*; give positive ones of the layers \[1, 2\] only"):
            DeltaProjection.from_vectors(engine, vectors, LAYERS, weights)
    wrong: Any = ({"draws": 0}, {"penalty": 0.0})
    for setting in wrong:
        with pytest.raises(ValueError, match=r"draws is .*, penalty is .*; give at least 1 draw"):
            Probe.from_vectors(engine, vectors, 2, seeded(), **setting)
    with pytest.raises(ValueError, match="trigger_length is 0; give a slot of at least 1 token"):
        Probe.from_vectors(Engine(model, problem.resized(0)), vectors, 2, seeded())
