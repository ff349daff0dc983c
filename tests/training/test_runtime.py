"""Optimizer, objective and the jitted train step."""

import logging
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idml_jax import ism, losses, mixing
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.models import EmbeddingModel
from idml_jax.models.convnet import ConvNet
from idml_jax.models.heads import Heads
from idml_jax.runtime import cpus, sharding
from idml_jax.training import steps, train, watch
from idml_jax.training.config import default_config
from idml_jax.training.optim import GroupOptimizer, Schedule
from idml_jax.training.state import create_state
from idml_jax.training.tasks.metrics_of_run import training_metric
from idml_jax.training.tasks.objective import Objective


def metric(introspective=True, **settings):
    config = default_config()
    config.ism.update(settings, enabled=introspective)
    return training_metric(config)


def objective(**changes):
    of_metric = {k: changes.pop(k) for k in ("introspective", "variant", "temperature") if k in changes}
    settings = dict(
        loss="proxy_anchor",
        options=(),
        metric=metric(**of_metric),
        num_classes=4,
        dim=8,
        uncertainty_dim=4,
    )
    return Objective(**{**settings, **changes})


def optimizer(**changes):
    settings = dict(
        name="adamw",
        schedule=Schedule("constant", 1e-2, 100),
        factors=(("proxies", 10.0),),
        weight_decay=1e-2,
        clip_value=10.0,
    )
    return GroupOptimizer(**{**settings, **changes})


def tiny(frozen=False):
    return EmbeddingModel(ConvNet(depth=2, width=8, frozen_statistics=frozen), Heads(8, 4, uncertainty_hidden=16))


def setup(model=None, **changes):
    model = model or tiny()
    settings = dict(model=model, objective=objective(), optimizer=optimizer(), mixup_alpha=1.0)
    return steps.StepSetup(**{**settings, "mean": (0.5,), "std": (0.25,), **changes})


def batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (n, 8, 8, 1)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 4, n), jnp.int32),
    }


jit_create_state = jax.jit(create_state, static_argnums=(1, 2, 3, 4))


def fresh(setup, seed=0):
    return jit_create_state(jax.random.key(seed), setup.model, setup.objective, setup.optimizer, (8, 8, 1))


def changed(before, after):
    return {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if np.any(np.asarray(leaf) != np.asarray(dict(jax.tree_util.tree_leaves_with_path(before))[path]))
    }


class TestSchedule:
    def test_step(self):
        schedule = Schedule("step", 1.0, 100, every=10, factor=0.5)
        assert [float(schedule(jnp.asarray(s))) for s in (0, 9, 10, 19, 35)] == [1.0, 1.0, 0.5, 0.5, 0.125]

    def test_cosine_and_constant(self):
        cosine = Schedule("cosine", 2.0, 100)
        np.testing.assert_allclose([float(cosine(jnp.asarray(s))) for s in (0, 50, 100)], [2.0, 1.0, 0.0], atol=1e-6)
        assert float(Schedule("constant", 2.0, 100)(jnp.asarray(70))) == 2.0

    def test_unknown_names(self):
        with pytest.raises(UserError, match="known: step, cosine, constant"):
            Schedule("linear", 1.0, 10)
        with pytest.raises(UserError, match="known: adamw, sgd"):
            optimizer(name="adam")


class TestOptimizer:
    def setup_method(self):
        trunk = {"conv1": jnp.full((3,), 2.0), "bn1": {"scale": jnp.ones(3)}}
        self.params = {"trunk": trunk, "proxies": jnp.ones(2)}
        self.grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32) * 30 - 20, self.params)

    def test_adamw_is_optaxs_with_a_rate_per_group(self):
        rule = optimizer(clip_value=0.0)
        params, _ = rule.update(self.grads, rule.init(self.params), self.params, jnp.asarray(0))
        for group, rate in (("trunk", 1e-2), ("proxies", 1e-1)):
            reference = optax.adamw(rate, weight_decay=1e-2)
            updates, _ = reference.update(self.grads[group], reference.init(self.params[group]), self.params[group])
            chex.assert_trees_all_close(params[group], optax.apply_updates(self.params[group], updates), rtol=1e-6)

    def test_sgd_is_nesterovs(self):
        rule = optimizer(name="sgd", weight_decay=0.0, clip_value=0.0, factors=())
        reference = optax.sgd(1e-2, momentum=0.9, nesterov=True)
        params, state = self.params, rule.init(self.params)
        expected, reference_state = self.params, reference.init(self.params)
        for step in range(3):
            params, state = rule.update(self.grads, state, params, jnp.asarray(step))
            updates, reference_state = reference.update(self.grads, reference_state, expected)
            expected = optax.apply_updates(expected, updates)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)

    def test_gradients_are_clipped_by_value(self):
        rule = optimizer(name="sgd", weight_decay=0.0, clip_value=10.0, factors=())
        params, _ = rule.update(self.grads, rule.init(self.params), self.params, jnp.asarray(0))
        clipped = jax.tree.map(lambda g: jnp.clip(g, -10, 10), self.grads)
        expected, _ = optimizer(name="sgd", weight_decay=0.0, clip_value=1e9, factors=()).update(
            clipped, rule.init(self.params), self.params, jnp.asarray(0)
        )
        chex.assert_trees_all_close(params, expected)
        assert np.any(np.asarray(self.grads["trunk"]["conv1"]) != np.asarray(clipped["trunk"]["conv1"]))

    def test_a_frozen_group_keeps_values_and_state_exactly(self):
        rule = optimizer()
        state = rule.init(self.params)
        params, new_state = rule.update({"proxies": self.grads["proxies"]}, state, self.params, jnp.asarray(0))
        chex.assert_trees_all_equal(params["trunk"], self.params["trunk"])
        chex.assert_trees_all_equal(new_state["trunk"], state["trunk"])
        assert changed(self.params["proxies"], params["proxies"])

    def test_frozen_normalisation_neither_moves_nor_decays(self):
        rule = optimizer(frozen_norm=True)
        params, _ = rule.update(self.grads, rule.init(self.params), self.params, jnp.asarray(0))
        chex.assert_trees_all_equal(params["trunk"]["bn1"], self.params["trunk"]["bn1"])
        assert changed(self.params["trunk"]["conv1"], params["trunk"]["conv1"])


class TestObjective:
    embedding = Embedding(
        ism.l2_normalize(jax.random.normal(jax.random.key(0), (6, 8))), jax.random.normal(jax.random.key(1), (6, 4))
    )
    labels = jnp.asarray([0, 1, 2, 3, 0, 1])

    def test_it_is_the_loss_of_the_introspective_matrix(self):
        rule = objective()
        params = rule.init(jax.random.key(2))
        assert params["proxies"].shape == (4, 8)
        similarity = ism.introspective_similarity(self.embedding, Embedding(params["proxies"]), temperature=5.0)
        pairs = losses.pairs_from_labels(self.labels, jnp.arange(4))
        expected = losses.proxy_anchor(similarity, pairs)
        np.testing.assert_allclose(rule(params, self.embedding, self.labels), expected, rtol=1e-6)

    def test_plain_ignores_uncertainty_and_introspective_does_not(self):
        for introspective in (True, False):
            rule = objective(introspective=introspective)
            params = rule.init(jax.random.key(2))
            loss = lambda u, rule=rule, params=params: rule(params, self.embedding._replace(uncertainty=u), self.labels)
            gradient = jax.grad(loss)(self.embedding.uncertainty)
            assert bool(jnp.any(gradient != 0)) is introspective

    def test_variants_differ_and_bad_ones_are_refused(self):
        values = set()
        for variant in ("relative", "absolute", "released"):
            rule = objective(variant=variant)
            values.add(float(rule(rule.init(jax.random.key(2)), self.embedding, self.labels)))
        assert len(values) == 3
        with pytest.raises(UserError, match="known: relative, absolute, released"):
            objective(variant="squared")
        with pytest.raises(UserError, match="unknown loss 'proxy'"):
            objective(loss="proxy")
        with pytest.raises(UserError, match="must be above 0"):
            objective(temperature=0.0)


def test_mixup_blends_rows_with_their_partners():
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
    mixed = jax.jit(mixing.mixup)(jax.random.key(1), images)
    assert 0 <= float(mixed.lam) <= 1
    assert sorted(np.asarray(mixed.partner)) == list(range(8))
    chex.assert_trees_all_close(mixed.images, mixed.lam * images + (1 - mixed.lam) * images[mixed.partner], rtol=1e-5)
    lams = jax.vmap(lambda k: mixing.mixup(k, images).lam)(jax.random.split(jax.random.key(2), 500))
    # Beta(1, 1) is uniform.
    assert float(lams.mean()) == pytest.approx(0.5, abs=0.05) and float(lams.std()) == pytest.approx(0.289, abs=0.03)


class TestTrainStep:
    @pytest.mark.slow  # three steps of every kind are in test_golden.py
    def test_golden_step(self):
        """The step equals its parts: loss of originals plus weighted loss of mixtures, and one AdamW step."""
        s = setup()
        state, data = fresh(s), batch()
        after, metrics = steps.jit_train_step(fresh(s), data, setup=s)

        key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 4)[0]
        mixed = mixing.mixup(key, steps.normalize(data["image"], s.mean, s.std))

        def total(params):
            variables = {"params": {k: params[k] for k in ("trunk", "heads")}, "batch_stats": state.batch_stats}
            out, _ = s.model.apply(
                variables, steps.normalize(data["image"], s.mean, s.std), True, mutable=["batch_stats"]
            )
            out_mixed, _ = s.model.apply(variables, mixed.images, True, mutable=["batch_stats"])
            loss = lambda o, labels: s.objective(params, Embedding(o["semantic"], o["uncertainty"]), labels)
            return (
                loss(out, data["label"])
                + mixed.lam * loss(out_mixed, data["label"])
                + (1 - mixed.lam) * loss(out_mixed, data["label"][mixed.partner])
            )

        value, grads = jax.jit(jax.value_and_grad(total))(state.params)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-4)
        params, _ = s.optimizer.update(grads, state.opt_state, state.params, jnp.asarray(0))
        # Adam's first step is about the gradient's sign, so a gradient near 0 may differ by a whole step.
        difference = jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b) > 1e-4), after.params, params)
        assert max(jax.tree.leaves(jax.tree.map(float, difference))) < 0.02
        assert int(after.step) == 1

    def test_loss_falls(self):
        s = setup(mixup_alpha=0.0)
        state, data = fresh(s), batch()
        values = []
        for _ in range(30):
            state, metrics = steps.jit_train_step(state, data, setup=s)
            values.append(float(metrics["loss"]))
        assert values[-1] < 0.5 * values[0]

    def test_warm_up_moves_heads_and_proxies_only(self):
        s = setup()
        before = jax.tree.map(np.asarray, fresh(s))
        state, _ = steps.jit_train_step(fresh(s), batch(), setup=s, train_trunk=False)
        chex.assert_trees_all_equal(before.params["trunk"], jax.tree.map(np.asarray, state.params["trunk"]))
        chex.assert_trees_all_equal(before.opt_state["trunk"], jax.tree.map(np.asarray, state.opt_state["trunk"]))
        assert changed(before.params["heads"], state.params["heads"]) and changed(
            before.params["proxies"], state.params["proxies"]
        )

    def test_frozen_batchnorm_really_freezes(self):
        model = tiny(frozen=True)
        s = setup(model, optimizer=optimizer(frozen_norm=True))
        before = jax.tree.map(np.asarray, fresh(s))
        state = fresh(s)
        for i in range(3):
            state, _ = steps.jit_train_step(state, batch(seed=i), setup=s)
        chex.assert_trees_all_equal(before.batch_stats, jax.tree.map(np.asarray, state.batch_stats))
        moved = changed(before.params["trunk"], state.params["trunk"])
        assert moved and not any("bn" in name for name in moved)

    @pytest.mark.slow  # other steps on one and on eight devices: test_devices.py
    def test_same_on_one_device_and_on_eight(self):
        s = setup()
        results = []
        for devices in (jax.devices()[:1], jax.devices()):
            mesh = sharding.data_mesh(devices)
            state = sharding.replicate(fresh(s), mesh)
            data = sharding.shard_batch({k: np.asarray(v) for k, v in batch().items()}, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = steps.jit_train_step(state, data, setup=s)
            results.append(jax.tree.map(np.asarray, (metrics, state.batch_stats)))
        chex.assert_trees_all_close(*results, rtol=2e-4, atol=1e-5)

    def test_steps_draw_different_mixtures_from_the_same_seed(self):
        s = setup()
        state = fresh(s)
        first = steps.jit_train_step(state, batch(), setup=s)[1]["loss_mixed"]
        later = steps.jit_train_step(fresh(s).replace(step=jnp.asarray(1)), batch(), setup=s)[1]["loss_mixed"]
        assert float(first) != float(later)


# One loss for each kind of matrix and of mining; the losses by themselves are in tests/losses.
QUICK = (
    ("contrastive", True), ("margin_distance_weighted", True), ("proxy_anchor", True), ("proxy_anchor", False),
    ("soft_triple", True),
)  # fmt: skip
ROWS = [
    pytest.param(name, introspective, marks=() if (name, introspective) in QUICK else pytest.mark.slow)
    for name in sorted(losses.LOSSES)
    for introspective in (True, False)
]


@pytest.mark.parametrize("name,introspective", ROWS)
def test_every_loss_trains_plain_and_introspective(name, introspective):
    """Some steps on one P x K batch: the loss of the batch falls, and u learns exactly when it is asked."""
    rule = objective(loss=name, introspective=introspective)
    s = setup(objective=rule, mixup_alpha=0.0, optimizer=optimizer(weight_decay=0.0))
    state, data = fresh(s), batch()
    data["label"] = jnp.repeat(jnp.arange(4), 4)
    start = jax.tree.map(np.asarray, state.params["heads"])
    values = []
    for _ in range(25):
        state, metrics = steps.jit_train_step(state, data, setup=s)
        values.append(float(metrics["loss"]))
    # From an untrained network the hardest triplets of random images only shrink all distances (docs/losses.md).
    share = 1.0 if name == "triplet_hard" else 0.8
    assert np.isfinite(values).all() and np.mean(values[-3:]) < share * np.mean(values[:3])
    moved = changed(start, state.params["heads"])
    assert any("uncertainty" in k for k in moved) is introspective and any("semantic" in k for k in moved)


@pytest.mark.parametrize("learned,shape", [pytest.param("shared", (), marks=pytest.mark.slow), ("per_class", (4,))])
def test_a_learned_boundary_is_a_parameter(learned, shape):
    rule = objective(loss="margin_distance_weighted", learned=learned, options=(("beta", 1.1),))
    s = setup(objective=rule)
    state = fresh(s)
    assert set(state.params) == {"trunk", "heads", "loss"}
    np.testing.assert_allclose(state.params["loss"]["beta"], np.full(shape, 1.1, np.float32))
    state, _ = steps.jit_train_step(state, batch(), setup=s)
    assert np.all(np.asarray(state.params["loss"]["beta"]) != np.float32(1.1))
    with pytest.raises(UserError, match="contrastive has nothing to learn; these do: margin_distance_weighted"):
        objective(loss="contrastive", learned="shared")


def test_a_memory_fills_after_its_warm_up_adds_pairs_and_is_left_out_before():
    plain = setup(objective=objective(loss="contrastive"), mixup_alpha=0.0)
    s = setup(objective=objective(loss="contrastive", memory_size=48, memory_warmup=2), mixup_alpha=0.0)
    state, reference = fresh(s), fresh(plain)
    losses_seen = []
    for step in range(4):
        state, metrics = steps.jit_train_step(state, batch(seed=step), setup=s)
        reference, expected = steps.jit_train_step(reference, batch(seed=step), setup=plain)
        losses_seen.append((float(metrics["loss"]), float(expected["loss"])))
    assert losses_seen[0][0] == pytest.approx(losses_seen[0][1], rel=1e-5)
    assert losses_seen[1][0] == pytest.approx(losses_seen[1][1], rel=1e-5)
    assert losses_seen[2][0] != pytest.approx(losses_seen[2][1], rel=1e-5)
    assert int(state.memory.valid.sum()) == 48 and int(state.memory.position) == 16
    with pytest.raises(UserError, match="proxy_anchor compares with proxies"):
        objective(memory_size=48)


def test_batches_that_do_not_split_over_the_devices_are_refused():
    mesh = sharding.data_mesh()
    sharding.check_divisible(16, mesh, "config.batch_size")
    with pytest.raises(UserError, match=r"config.batch_size \(12\) must be a multiple of the 8 devices"):
        sharding.check_divisible(12, mesh, "config.batch_size")


class TestWaiting:
    def run(self, monkeypatch, reads, works, threads=4, processes=1, count=16, batches=20, epoch=20):
        """The log line of a simulated run: ``reads`` seconds to read a batch, ``works`` seconds to compute a step.

        As in the loop, the metrics of a step are fetched after the next one has been started.
        """
        now, free = [0.0], 0.0
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(watch, "cpus", SimpleNamespace(available=lambda: count))
        waiting, told, came = watch.Waiting(threads, processes), [], [0.0]

        def read():
            for number in range(batches):  # the reader goes on while the loop waits for the device
                came[0] = max(came[0] + reads, now[0] - 4 * reads)
                now[0] = max(now[0], came[0])
                yield {"index": number}

        for step, batch in enumerate(waiting.over(read()), 1):
            assert batch["index"] == step - 1
            before, free = free, max(free, now[0]) + works
            now[0] = max(now[0], before)  # the step before this one is done
            if step % 10 == 0 or step % epoch == 0:
                start, now[0] = now[0], max(now[0], free)
                waiting.computed(now[0] - start)
                told.append(waiting.told())
            if step % epoch == 0:
                now[0] += 1000.0  # an evaluation, during which the reader reads ahead
                waiting.pause(1000.0)
        assert len(list(filter(None, told))) < 2  # once in a run
        return "".join(told)

    def test_a_run_that_waits_for_images_is_told_how_not_to(self, monkeypatch):
        assert self.run(monkeypatch, 1.2, 0.3) == (
            "76 % of the time went into waiting for images: 4 threads read them on 16 CPUs; config.data.threads=16 "
            "uses all"
        )

    def test_threads_are_those_of_each_process(self, monkeypatch):
        told = self.run(monkeypatch, 1.2, 0.3, processes=3)
        assert "12 threads read them on 16 CPUs; config.data.threads=6 uses" in told

    def test_short_epochs_count_together(self, monkeypatch):
        assert "of the time" in self.run(monkeypatch, 0.2, 0.05, batches=200, epoch=10)

    @pytest.mark.parametrize(
        "changes",
        [
            {"reads": 0.2, "works": 1.0},  # never waits
            {"reads": 1.05, "works": 1.0},  # the loop waits all the time, the device for 5 % of it
            {"reads": 0.2, "works": 0.05},  # too short to tell
            {"reads": 0.9, "works": 0.3, "threads": 16},  # nothing is idle
            {"reads": 0.9, "works": 0.3, "count": 2},
        ],
    )
    def test_others_are_not(self, monkeypatch, changes):
        assert not self.run(monkeypatch, **changes)

    def test_the_loop_asks_and_says_it(self, image_folder, tmp_path, monkeypatch, caplog):
        """At every row of the log, after the time of a step; evaluations and the first step do not count."""
        from runs_made import small_config

        calls = []

        class Recorded(watch.Waiting):
            def restart(self):
                calls.append("restart")
                super().restart()

            def pause(self, seconds):
                calls.append("pause" if seconds > 0 else "nothing")

            def over(self, batches):
                for batch in super().over(batches):
                    calls.append("batch")
                    yield batch

            def computed(self, seconds):
                calls.append("computed" if 0 <= seconds < 60 else "wrong")

            def told(self):
                calls.append("told")
                return "so many threads" if calls.count("told") == 2 else ""

        monkeypatch.setattr(watch, "Waiting", Recorded)
        config = small_config(image_folder, epochs=2, **{"eval.untrained": False, "log.every_steps": 2})
        with caplog.at_level(logging.WARNING):
            train.train_and_evaluate(config, tmp_path / "run")
        row, batch = ["computed", "told"], ["batch"]
        # Three steps an epoch: rows after the steps 2, 3, 4 and 6.
        assert calls == [
            "restart", *batch, "restart", *batch, *row, *batch, *row, "pause",
            *batch, *row, *batch, *batch, *row, "pause",
        ]  # fmt: skip
        assert [line for line in caplog.messages if "so many" in line] == ["warning: so many threads"]


def test_a_quota_limits_the_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "QUOTA", tmp_path / "cpu.max")
    every = cpus.available()
    for text, count in (
        ("max 100000", every),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("9900000 100000", every),
        ("", every),
    ):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert cpus.available() == count, text
