import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.losses import (
    DKD,
    BernoulliTarget,
    Hint,
    LabelSmoothing,
    LogitMSE,
    SimilarityPreserving,
    SoftTarget,
    bernoulli_target,
    cosine,
    hint,
    soft_target,
    squared_error,
)
from distill.objective import Objective, Outputs, SoftTargets, Term, zero_of
from workbench.duration import Duration
from workbench.tasks import OutputType


def never(unit: str) -> float:
    return 0.0


def own(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1, 1]))


def seen(classes: int = 3, width: int = 5, names: tuple[str, ...] = ("a",)) -> Outputs:
    return Outputs(
        torch.randn(4, classes, requires_grad=True),
        {name: torch.randn(4, width, requires_grad=True) for name in names},
    )


def test_soft_targets_are_the_loss_of_hinton() -> None:
    objective, student, teacher = Objective(SoftTargets(4.0, 0.7), outputs="classes"), seen(), seen()
    assert student.logits is not None
    assert teacher.logits is not None
    found = objective(student, teacher, objective.weights(never), own)
    soft, hard = soft_target(student.logits, teacher.logits, 4.0), own(student.logits)
    assert torch.equal(found["soft"], soft)
    assert torch.equal(found["hard"], hard)
    assert torch.equal(found["loss"], 0.7 * soft + 0.30000000000000004 * hard)


def test_terms_of_weight_zero_are_not_computed_and_the_own_one_is_logged() -> None:
    class Broken(SoftTarget.__base__):  # type: ignore[misc, name-defined]
        needs_labels, needs_teacher = False, True

        def forward(self, *_: Any) -> Tensor:
            raise AssertionError("computed")

    objective = Objective(
        {"broken": Term(Broken(), 0.0), "soft": Term(SoftTarget()), "hard": Term(weight=0.0)}, outputs="classes"
    )
    student = seen()
    assert student.logits is not None
    found = objective(student, seen(), objective.weights(never), own)
    assert found.keys() == {"loss", "soft", "hard"}
    assert torch.equal(found["loss"], found["soft"])
    assert not found["hard"].requires_grad


@given(st.floats(0, 5), st.integers(0, 10), st.one_of(st.none(), st.integers(1, 10)), st.floats(0, 1), st.floats(0, 20))
def test_the_weight_over_time(weight: float, warmup: int, decay: int | None, final: float, now: float) -> None:
    term = Term(SoftTarget(), weight, warmup=Duration(warmup, "ep"), decay=decay and Duration(decay, "it"), final=final)
    found = term.weight_at(lambda unit: now if unit == "ep" else 2 * now)
    up = 1.0 if warmup == 0 else min(1.0, now / warmup)
    down = 1.0 if not decay else 1 - (1 - final) * min(1.0, 2 * now / decay)
    assert math.isclose(found, weight * up * down, abs_tol=1e-12)


def test_a_lone_term_before_its_warm_up_teaches_nothing() -> None:
    objective = Objective({"soft": Term(SoftTarget(), warmup=Duration(2, "ep"))})
    weights = objective.weights(never)
    assert weights == {"soft": 0.0}
    assert not objective.needs_teacher(weights)
    student = seen()
    assert student.logits is not None
    loss = objective(student, Outputs(None), weights, own)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.logits.grad, torch.zeros(4, 3))  # type: ignore[arg-type]


def test_a_term_whose_time_has_not_come_keeps_every_parameter_in_the_graph() -> None:
    """Data-parallel training fails on parameters that took no part; and a class may have no probability."""
    late = Duration(2, "ep")
    terms = {"soft": Term(SoftTarget(), warmup=late), "hint": Term(Hint(), student="a", warmup=late), "hard": Term()}
    objective, student, teacher = Objective(terms), seen(), seen(width=7)
    objective.prepare(student.features, teacher.features)
    assert student.logits is not None
    logits = torch.cat([student.logits, torch.full((4, 1), -math.inf)], 1)
    found = objective(
        Outputs(logits, student.features), Outputs(None), objective.weights(never), lambda z: z[:, :1].sum()
    )
    assert torch.equal(found["loss"], found["hard"])
    found["loss"].backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in objective.parameters())  # type: ignore[arg-type]
    assert student.logits.grad is not None
    assert student.logits.grad.isfinite().all()


def test_logits_that_a_teacher_does_not_give_are_missed() -> None:
    """The student would be compared with itself."""
    objective = Objective({"soft": Term(SoftTarget())})
    with pytest.raises(ValueError, match="term 'soft' compares logits, and the teacher gave none"):
        objective(seen(), Outputs(None), {"soft": 1.0}, own)


def test_features_of_equal_width_need_no_projector_to_learn() -> None:
    objective = Objective({"hint": Term(Hint(), 2.0, student="a", teacher="b"), "hard": Term()})
    student, teacher = seen(), seen(names=("b",))
    objective.prepare(student.features, teacher.features)
    assert not list(objective.parameters())
    found = objective(student, teacher, objective.weights(never), own)
    expected = hint(student.features["a"], teacher.features["b"])
    assert torch.allclose(found["hint"], expected)
    assert torch.allclose(found["loss"], 2 * expected + found["hard"])


def test_projectors_learn_and_belong_to_their_student() -> None:
    term = Term(Hint(), student={"small": ["a", "c"], "tiny": "a.*"}, teacher=["b", "d"])
    objective = Objective({"hint": term}, ("small", "tiny"))
    teacher = seen(width=7, names=("b", "d"))
    students = {"small": seen(names=("a", "c")), "tiny": seen(width=3, names=("a.1", "a.2"))}
    for name, student in students.items():
        objective.prepare(student.features, teacher.features, name)
    shapes = {name: [list(p.shape) for p in objective.parameters_of(name)] for name in students}
    assert shapes == {"small": [[7, 5], [7]] * 2, "tiny": [[7, 3], [7]] * 2}
    for name, student in students.items():
        objective.zero_grad()
        objective(student, teacher, {"hint": 1.0}, own, member=name)["loss"].backward()
        for member in students:
            assert all((p.grad is not None) == (member == name) for p in objective.parameters_of(member))
        assert all(feature.grad is not None for feature in student.features.values())
    assert objective.student_layers("tiny") == ["a.*"]
    assert objective.teacher_layers() == ["b", "d"]


def test_projectors_must_be_made_first() -> None:
    objective = Objective({"hint": Term(Hint(), student="a")})
    with pytest.raises(ValueError, match="has no projector yet: call prepare"):
        objective(seen(), seen(), {"hint": 1.0}, own)


def test_a_checkpoint_s_projectors_are_left_alone_where_there_are_none() -> None:
    term = Term(Hint(), student="a")
    made, fresh = Objective({"hint": term}), Objective({"hint": term})
    made.prepare(seen().features, seen(width=7).features)
    assert made.state_dict()
    fresh.load_state_dict(made.state_dict())
    assert not fresh.state_dict()
    again = Objective({"hint": term})
    again.prepare(seen().features, seen(width=7).features)
    again.load_state_dict(made.state_dict())
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in again.state_dict().items())


def test_tokens_mask_features_of_tokens_and_valid_those_of_samples() -> None:
    objective = Objective({"hint": Term(Hint(), student="a")})
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    mine, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    student, teacher = Outputs(torch.randn(2, 3), {"a": mine}), Outputs(None, {"a": theirs})
    objective.prepare(student.features, teacher.features)
    valid = torch.tensor([True, False])
    found = objective(student, teacher, {"hint": 1.0}, own, valid=valid, tokens=tokens)["hint"]
    assert torch.allclose(found, hint(mine[tokens], theirs[tokens]))
    found = objective(student, teacher, {"hint": 1.0}, own, valid=valid)["hint"]
    assert torch.allclose(found, hint(mine[:1], theirs[:1]))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), torch.full((2, 3), 7e4), 7e4**2),
        (torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2, 3), 1.003), 0.003**2),
        (torch.ones(2, 3, dtype=torch.float16), torch.full((2, 3), 3e38, dtype=torch.bfloat16), float("inf")),
        (torch.zeros(2, 3), torch.full((2, 3), 1 + 2.0**-40, dtype=torch.float64), (1 + 2.0**-40) ** 2),
    ],
)
def test_features_are_compared_in_the_wider_type(student: Tensor, teacher: Tensor, expected: float) -> None:
    objective = Objective({"hint": Term(Hint(), student="a")})
    student.requires_grad_()
    objective.prepare({"a": student}, {"a": teacher})
    value = objective(Outputs(student, {"a": student}), Outputs(None, {"a": teacher}), {"hint": 1.0}, zero_of)["loss"]
    assert value.item() == pytest.approx(expected, rel=1e-4 if teacher.dtype == torch.float32 else 1e-14)
    value.backward()
    assert student.grad is not None


def test_who_is_asked() -> None:
    objective = Objective(
        {
            "smooth": Term(LabelSmoothing()),
            "soft": Term(DKD(), warmup=Duration(1, "ep")),
            "like": Term(SimilarityPreserving(), 0.0, student="a"),
        }
    )
    early, late = objective.weights(never), objective.weights(lambda unit: 1.0)
    assert (objective.needs_teacher(early), objective.needs_logits(early)) == (False, False)
    assert (objective.needs_teacher(late), objective.needs_logits(late)) == (True, True)
    assert objective.needs_teacher({"smooth": 0, "soft": 0, "like": 1})
    assert not objective.needs_logits({"smooth": 0, "soft": 0, "like": 1})
    assert not objective.projects
    assert Objective({"hint": Term(Hint(), student="a")}).projects


def test_a_sample_of_the_teacher_is_enough_for_soft_targets_alone() -> None:
    student = torch.randn(4, 6)
    log_probs = torch.log_softmax(torch.randn(4, 6), -1)
    ids = torch.arange(6).expand(4, 6)
    teacher = Outputs(None, {}, (ids, log_probs.exp(), log_probs))
    found = Objective({"soft": Term(SoftTarget(1.0))}, outputs="classes")(
        Outputs(student), teacher, {"soft": 1.0}, own
    )["soft"]
    assert torch.allclose(found, soft_target(student, log_probs, 1.0), atol=1e-6)
    for loss in (DKD(), SoftTarget(2.0), SoftTarget(1.0, standardize=True)):
        with pytest.raises(ValueError, match=r"needs all of the teacher's logits.*SoftTarget at temperature 1"):
            Objective({"soft": Term(loss)}, outputs="classes")(Outputs(student), teacher, {"soft": 1.0}, own)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Term(weight=-1.0), "weight is -1.0"),
        (lambda: Term(weight=math.inf), "weight is inf"),
        (lambda: Term(final=1.5), "final is 1.5"),
        (lambda: Term(decay=Duration(0, "ep")), "decay is 0ep"),
        (lambda: Term(Hint()), "Hint compares features: name them"),
        (lambda: Term(SoftTarget(), student="a"), "SoftTarget on submodules compares the outputs of heads: name them"),
        (lambda: Term(student="a"), "the task's own loss takes no submodules"),
        (lambda: Objective({}), "nothing to learn from"),
        (lambda: Objective({"hard": Term(weight=0.0)}), "nothing to learn from"),
        (lambda: Objective({"loss": Term()}), "a term is called 'loss'"),
        (lambda: Objective({"a/b": Term()}), "a term is called 'a/b'"),
        (lambda: Objective({"float": Term()}), "a term is called 'float'"),
        (
            lambda: Objective({"hint": Term(Hint(), student={"big": "a"}, teacher="b")}, ("small",)),
            r"names the students \['big'\]: the family is \['small'\]",
        ),
    ],
)
def test_what_makes_no_sense(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_features_that_do_not_pair_are_counted() -> None:
    objective = Objective({"like": Term(SimilarityPreserving(), student="a.*", teacher="b")})
    student = seen(names=("a.1", "a.2"))
    with pytest.raises(ValueError, match=r"compares 2 features of the student \(a.1, a.2\) with 1 of the teacher"):
        objective(student, seen(names=("b",)), {"like": 1.0}, own)
    by_name = Objective({"like": Term(SimilarityPreserving(), student={"s": "a"})}, ("s",))
    with pytest.raises(ValueError, match="name the teacher's too"):
        by_name.teacher_layers()


def test_outputs_are_said_once() -> None:
    objective = Objective(SoftTargets())
    with pytest.raises(ValueError, match="compares outputs, and it is not said what they are: call resolve first"):
        objective(seen(), seen(), objective.weights(never), own)
    labels = objective.resolve(OutputType("labels"))
    assert objective.resolve(OutputType("labels")) == labels
    assert isinstance(objective.losses["soft"], BernoulliTarget)
    with pytest.raises(ValueError, match="before: they stay the same"):
        objective.resolve(OutputType("classes"))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("classes", lambda s, t, v: soft_target(s, t, 4.0, v[:, 0])),
        ("labels", lambda s, t, v: bernoulli_target(s, t, 4.0, v)),
        ("numbers", lambda s, t, v: squared_error(s, t, v)),
        ("embedding", lambda s, t, v: cosine(s, t, v[:, 0])),
    ],
)
def test_soft_targets_of_every_kind_of_outputs(outputs: Any, expected: Any) -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    valid = torch.tensor([True, False, True, True])
    objective = Objective(SoftTargets(alpha=1.0), outputs=outputs)
    found = objective(Outputs(student), Outputs(teacher), objective.weights(never), own, valid=valid)["soft"]
    assert torch.equal(found, expected(student, teacher, valid[:, None].expand(4, 3)))


def test_a_loss_on_vectors_takes_each_number_as_one() -> None:
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    valid = torch.rand(4, 3) < 0.6
    found = Objective({"z": Term(LogitMSE())}, outputs="numbers")(
        Outputs(student), Outputs(teacher), {"z": 1.0}, own, valid=valid
    )
    torch.testing.assert_close(found["z"], squared_error(student, teacher, valid))


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_one_output_may_have_an_axis_or_none(kind: Any) -> None:
    student, teacher = torch.randn(4, requires_grad=True), torch.randn(4, 1)
    objective = Objective(SoftTargets(alpha=1.0), outputs=kind)
    found, expected = (
        objective(Outputs(student), Outputs(each), objective.weights(never), zero_of)["soft"]
        for each in (teacher, teacher.squeeze(1))
    )
    assert found == expected


def test_one_class_is_refused_by_every_loss_on_classes() -> None:
    logits = torch.randn(4, 1)
    for loss in (SoftTarget(), LogitMSE()):
        objective = Objective({"z": Term(loss)}, outputs="classes")
        with pytest.raises(ValueError, match="a softmax over one class is always 1"):
            objective(Outputs(logits), Outputs(logits), {"z": 1.0}, own)


def test_heads_are_compared_by_what_they_are() -> None:
    """Each head of a network is a term; nothing need be known of what the network returns."""
    head = torch.randn(4, 3, 5, requires_grad=True)
    student, teacher = Outputs(torch.tensor(1.0), {"a": head}), Outputs(None, {"b": torch.randn(4, 3, 5)})
    tokens = torch.rand(4, 5) < 0.6
    for outputs, expected in (
        (OutputType("classes", 1), lambda s, t: soft_target(s.mT, t.mT, 4.0, tokens)),
        ("classes", lambda s, t: soft_target(s, t, 4.0)),
    ):
        term = Term(SoftTarget(), student="a", teacher="b", outputs=outputs)  # type: ignore[arg-type]
        objective = Objective({"head": term})
        assert objective.student_layers() == ["a"]
        assert objective.teacher_layers() == ["b"]
        assert objective.needs_teacher({"head": 1.0})
        assert not objective.needs_logits({"head": 1.0})
        assert not objective.compares_outputs
        found = objective(student, teacher, {"head": 1.0}, own, tokens=tokens)
        torch.testing.assert_close(found["head"], expected(head, teacher.features["b"]))
        assert torch.autograd.grad(found["loss"], head)[0].any()


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ([4, 3], OutputType("classes")),
        ([4, 5, 3], OutputType("classes")),
        ([4, 3, 6, 7], OutputType("classes", 1)),
        ([4, 5, 3], OutputType("labels")),
    ],
)
def test_samples_that_count_are_those_of_every_position_of_a_head(shape: list[int], outputs: OutputType) -> None:
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = SoftTarget() if outputs.kind == "classes" else BernoulliTarget()
    objective = Objective({"head": Term(loss, student="a", outputs=outputs)})
    valid = torch.tensor([True, False, True, True])
    pair = Outputs(torch.tensor(1.0), {"a": student}), Outputs(None, {"a": teacher})
    found = objective(*pair, {"head": 1.0}, own, valid=valid)["head"]
    expected = loss(outputs.scored(student)[valid], outputs.scored(teacher)[valid])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Term(SoftTarget(), student="a"), "SoftTarget on submodules compares the outputs of heads: name them"),
        (lambda: Term(SoftTarget(), outputs="classes"), "name the heads that this term compares, student: heads.1"),
        (lambda: Term(SoftTarget(), student="a", outputs="labels"), "compares classes, and the outputs are labels"),
        (lambda: Term(DKD(), student="a", outputs="classes"), "DKD needs labels, and those of a head are not known"),
        (lambda: Term(Hint(), student="a", outputs="classes"), "Hint compares features: leave outputs out"),
        (lambda: Term(outputs="classes"), "the task's own loss takes no submodules"),
        (lambda: Term(SoftTarget(), student="a", outputs="words"), "outputs are 'words': choose from classes"),  # type: ignore[arg-type]
    ],
)
def test_heads_that_make_no_sense(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
