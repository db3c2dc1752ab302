"""The training step and the loop around it; tests/soak/test_steps.py has every method."""

import signal
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import testing
from plan_jax import checkpoint, evaluate, parallel, train
from plan_jax.command import StopSignal
from plan_jax.config import Config
from plan_jax.logger import Logger, read_rows
from plan_jax.model import Components, build_components
from plan_jax.state import State, init_state
from plan_jax.step import FINITE_GROUPS, FIRST_NONFINITE, WATCH_SHAPE, make_step, watch_numbers
from plan_jax.train import ThroughputMeter
from plan_jax.types import Batch, DivergedError, Features, Model, Result, TextBatch, UserError

# ConVIRT compiles soonest.
CONVIRT = {"method": "convirt", "hyper": {}, "fine_map": False}


def random_batch(pairs=16, seed=0, size=32, max_tokens=12, max_words=10):
    rng = np.random.default_rng(seed)
    position, slot = np.arange(max_tokens), np.arange(max_words)
    count = rng.integers(3, max_words + 1, (pairs, 1))
    pieces = rng.integers(5, 99, (pairs, max_tokens))
    words = rng.integers(5, 40, (pairs, max_words))
    image = rng.integers(0, 255, (pairs, size, size, 1), dtype=np.uint8)
    text = TextBatch(
        tokens=np.where(position < count + 2, pieces, 0),
        word_index=np.where((position >= 1) & (position <= count), position - 1, -1),
        word_id=np.where(slot < count, words, 0),
        sentence=np.where(slot < count, slot // 4, -1),
    )
    return Batch(image, text)


def make_config(changes=None, ema_decay=0.0, **optim):
    content = testing.get_config().to_dict() | (changes or CONVIRT) | {"ema_decay": ema_decay}
    content["optim"] |= {"learning_rate": 1e-3, **optim}
    return Config.from_dict(content | {"steps": 50})


def init(config, devices=1):
    """Returns the replicated state, the parallelised step and the mesh of a config."""
    mesh = parallel.make_mesh(devices)
    components = build_components(config, parallel.AXIS)
    state, optimiser = init_state(components, config, random_batch())
    step = make_step(components, optimiser, config.ema_decay, parallel.AXIS)
    return parallel.replicate(state, mesh), parallel.parallelise(step, mesh), mesh


def largest_difference(a, b):
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(x).max() + 1e-6)) for x, y in pairs)


def test_accumulation_updates_every_second_step():
    state, step, mesh = init(make_config(accumulate_steps=2))
    params = [parallel.to_host(state.params)]
    for seed in range(4):
        state, _ = step(state, parallel.shard(random_batch(seed=seed), mesh))
        params.append(parallel.to_host(state.params))
    updated = [largest_difference(a, b) > 0 for a, b in zip(params, params[1:], strict=False)]
    # The warm-up begins at a learning rate of 0, so the first update may change nothing.
    assert updated in ([False, True, False, True], [False, False, False, True])


def test_the_average_follows_the_parameters_and_teaches():
    hyper = {"num_sampled_words": 4, "tile_size": 2, "rounds": 0}
    changes = {"hyper": hyper | {"progress": "ema", "ema_ramp_steps": 1}}
    state, step, mesh = init(make_config(changes, ema_decay=0.9))
    start = parallel.to_host(state.ema_params)
    state, _ = step(state, parallel.shard(random_batch(), mesh))
    ema_params, params = parallel.to_host((state.ema_params, state.params))
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, params)
    assert largest_difference(expected, ema_params) < 1e-5


def test_a_teacher_without_an_average_is_refused():
    config = make_config({"hyper": {"num_sampled_words": 4, "tile_size": 2, "progress": "ema"}})
    with pytest.raises(UserError, match="ema_decay"):
        init_state(build_components(config), config, random_batch())


def test_the_rate_leaves_out_the_first_step():
    meter = ThroughputMeter(8)
    assert meter.measure(1) == {}
    assert meter.measure(3)["images_per_s"] > 0
    assert meter.measure(3) == {}


# The loop -----------------------------------------------------------------------------------------


class Batches:
    """Images that hold the number of their batch; `on_batch` is called with it."""

    def __init__(self, on_batch):
        self.step, self.on_batch = 0, on_batch

    def __next__(self):
        self.step += 1
        self.on_batch(self.step)
        words = np.zeros((8, 3), np.int32)
        image = np.full((8, 1, 1, 1), self.step % 256, np.uint8)
        return Batch(image, TextBatch(words, words, words, words))

    def get_state(self):
        return {"step": self.step}


def initial_state(step=0):
    return State(
        step=jnp.int32(step),
        key=jnp.zeros(2, jnp.uint32),
        params={"w": jnp.zeros(2)},
        batch_stats={},
        opt_state={},
        memory={},
        ema_params={},
    )


def test_a_run_names_the_parameters_that_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "is_main", lambda: False)  # which writes, too
    monkeypatch.setattr(train, "make_model", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *_: Result({"task/metric": 1.0}))
    run = train.Run(make_config(), *[None] * 5, Logger(tmp_path, {}, 1), None)
    state = initial_state()
    assert train.finish(run, state)["params_sha256"] == checkpoint.fingerprint(state.params)
    average = {"w": jnp.ones(2)}
    summary = train.finish(run, state.replace(ema_params=average))
    assert summary["params_sha256"] == checkpoint.fingerprint(average)


def one_number_step(compute=lambda number: {}):
    """Returns a step with the batch's number as loss; `compute` replaces loss, norm and weights."""

    def step(state, batch):
        number = parallel.mean(batch.image.astype(jnp.float32).mean())
        values = {"loss": number, "gradient_norm": number, "w": number} | compute(number)
        values[FINITE_GROUPS] = jnp.ones(1, bool)
        params = {"w": jnp.full(2, values.pop("w"))}
        return state.replace(step=state.step + 1, params=params), values

    return step


def run_loop(folder, compute=lambda number: {}, on_batch=lambda number: None, start=0, **fields):
    """Runs the loop of training with a step of one number; returns the last state."""
    devices = fields.pop("devices", 1)
    content = testing.get_config().to_dict() | {"steps": 8, "log_every": 10_000}
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (content[section] if section else content)[field] = value
    config = Config.from_dict(content)
    mesh = parallel.make_mesh(devices)
    state = parallel.replicate(initial_state(start), mesh)
    step = parallel.parallelise(watch_numbers(one_number_step(compute)), mesh)
    best = config.checkpoint.best or None
    keep = fields.get("checkpoint__keep", 9)
    manager = checkpoint.open_manager(folder / checkpoint.FOLDER, keep, best)
    batches = Batches(on_batch)
    batches.step = start
    with Logger(folder, {}, config.steps, start) as logger, StopSignal() as stop:
        run = train.Run(config, None, mesh, step, batches, manager, logger, stop)
        try:
            train.validate_again(run, state)
            return train.run_steps(run, state, start)
        finally:
            checkpoint.close(manager)


def saved_steps(folder):
    return checkpoint.folders.list_steps(folder / checkpoint.FOLDER)


def infinite_from(first, name):
    """Returns what makes a number infinite from a step on; it is finite again two steps later."""

    def compute(number):
        is_bad = (number >= first) & (number < first + 2)
        return {name: jnp.where(is_bad, jnp.inf, number)}

    return compute


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("name", "subject"),
    [("loss", "the loss is"), ("gradient_norm", "the gradient is"), ("w", "params.w is")],
)
def test_the_first_step_that_is_not_finite_is_named(name, subject, devices, tmp_path):
    # Neither logged nor saved at that step: it is known at the next save, here of step 6 or 5.
    every = 5 if name == "w" else 3
    with pytest.raises(train.NotFinite) as error:
        run_loop(tmp_path, infinite_from(4 if name != "w" else 5, name), checkpoint__every=every)
    assert (error.value.subject, error.value.step) == (subject, 4 if name != "w" else 5)
    assert saved_steps(tmp_path) == ([] if name == "w" else [3])


class Encoder:
    """Encodes by two numbers; `stem` and `token` may change them where the batch is bad.

    The last device has a bad batch in step 4.
    """

    def __init__(self, stem=lambda x, is_bad: x, token=lambda x, is_bad: x):
        self.stem, self.token = stem, token

    def apply(self, variables, batch, train, index, **options):
        axis, params = parallel.AXIS, variables["params"]
        is_last = jax.lax.axis_index(axis) == jax.lax.psum(1, axis) - 1
        is_bad = is_last & (batch.image.max() == 4)
        stem = self.stem(params["image_tower"]["stem"]["kernel"], is_bad)
        token = self.token(params["text_tower"]["token"]["embedding"], is_bad)
        ones = jnp.ones((len(batch.image), 1, 1))
        sides = (Features(x * ones[:, 0], x * ones, ones[..., 0] > 0) for x in (stem, token))
        return tuple(sides), {}


def sum_loss(params, memory, images, texts, extra, **options):
    """A method of two terms, one for each side."""
    terms = {"loss_report": images.pooled.mean(), "loss_word": texts.pooled.mean()}
    return sum(terms.values()), (terms, memory)


def lose_value(x, is_bad):
    return jnp.where(is_bad, jnp.nan, x)


@jax.custom_vjp
def lose_gradient(x, is_bad):
    return x


lose_gradient.defvjp(
    lambda x, is_bad: (x, is_bad), lambda is_bad, grad: (lose_value(grad, is_bad), None)
)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"token": lose_value}, "the loss (loss_word) is"),
        ({"stem": lose_value, "token": lose_value}, "the loss (loss_report and 1 more) is"),
        ({"token": lose_gradient}, "the gradient (text_tower/token) is"),
        (
            {"stem": lose_gradient, "token": lose_gradient},
            "the gradient (image_tower/stem and 1 more) is",
        ),
        ({"stem": lose_gradient, "token": lose_value}, "the loss (loss_word) is"),
    ],
)
def test_what_is_not_finite_on_one_device_is_named_on_all(changes, subject, devices):
    method = SimpleNamespace(IMAGE_FEATURES=("pooled",), TEXT_FEATURES=("pooled",), loss=sum_loss)
    optimiser, mesh = optax.sgd(0.1), parallel.make_mesh(devices)
    step = make_step(
        Components(Encoder(**changes), method, None, None), optimiser, 0.0, parallel.AXIS
    )
    step = parallel.parallelise(watch_numbers(step), mesh)
    towers = {"image_tower": {"stem": {"kernel": 1.0}}, "text_tower": {"token": {"embedding": 1.0}}}
    params = {"encoders": towers, "method": {}}
    state = initial_state().replace(params=params, opt_state=optimiser.init(params))
    carry = parallel.replicate((state, jnp.zeros(WATCH_SHAPE, jnp.int32)), mesh)
    batches = Batches(lambda number: None)
    for number in range(1, 7):
        carry, metrics = step(carry, parallel.shard(next(batches), mesh))
        if number < 4:
            train.require_finite(metrics, carry[0], is_saved=True)
    with pytest.raises(train.NotFinite) as error:
        train.require_finite(metrics, carry[0])
    assert (error.value.subject, error.value.step) == (subject, 4)
    copies = [np.asarray(shard.data) for shard in metrics[FIRST_NONFINITE].addressable_shards]
    assert len(copies) == devices and all((copy == copies[0]).all() for copy in copies)


def test_nothing_is_logged_from_the_first_step_on_that_is_not_finite(tmp_path):
    with pytest.raises(train.NotFinite):
        run_loop(tmp_path, infinite_from(4, "loss"), log_every=1)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3 and "first_nonfinite" not in rows[0]


def test_rows_come_at_their_own_interval(tmp_path):
    run_loop(tmp_path, steps=320, log_every=150, checkpoint__every=1000)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [150, 300, 320]


def test_a_long_run_without_logs_and_checkpoints_ends_soon(tmp_path):
    seen = []
    with pytest.raises(train.NotFinite):
        run_loop(
            tmp_path, infinite_from(4, "loss"), seen.append, steps=9000, checkpoint__every=9000
        )
    assert max(seen) <= train.FINITE_EVERY + 1


def test_the_sentence_names_the_step_the_remedy_and_the_checkpoint(tmp_path):
    for step in (5, 10):
        (tmp_path / str(step)).mkdir()
    config = make_config(learning_rate=1e30, clip_norm=0.0)
    error = train.diverged_error(train.NotFinite("the loss is", 12), config, tmp_path)
    assert isinstance(error, DivergedError) and str(error) == (
        "the loss is not finite from step 12 of 50 on; lower config.optim.learning_rate, now"
        " 1e+30, or set config.optim.clip_norm, now 0, with another --workdir; checkpoint"
        f" {tmp_path / '10'} has the last finite weights that were saved"
    )
    config = make_config({"dtype": "bfloat16"} | CONVIRT)
    error = train.NotFinite("the loss is", 1)
    sentence = str(train.diverged_error(error, config, tmp_path / "5"))
    assert "the data of the first batch, or use config.dtype=float32" in sentence
    assert "learning_rate" not in sentence and "no checkpoint was saved before" in sentence


@pytest.mark.parametrize(("start", "name"), [(0, "initial weights"), (3, "checkpoint")])
def test_a_start_that_is_not_finite_is_refused(start, name, tmp_path):
    state = initial_state().replace(params={"w": jnp.array([0, jnp.nan])})
    with pytest.raises(UserError, match=f"{name}.* has?v?e? values in params.w .*not finite; "):
        train.require_finite_start(state, make_config(), tmp_path, start)
    train.require_finite_start(initial_state(), make_config(), tmp_path, start)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_seen_in_the_step_in_which_it_arrives(name, tmp_path, capfd):
    def send(number):
        if number == 4:
            signal.raise_signal(getattr(signal, name))

    state = run_loop(tmp_path, on_batch=send)
    assert int(state.step) == 4 and saved_steps(tmp_path)[-1] == 4
    assert "stopping after this step, whose state is saved" in capfd.readouterr().err


@pytest.mark.parametrize("every", [4, 100])
def test_a_signal_that_ends_the_readers_too_loses_no_step(every, tmp_path):
    def fail(number):
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
            raise UserError("a reader process ended (SIGTERM)")

    state = run_loop(tmp_path, on_batch=fail, log_every=4, checkpoint__every=every)
    assert int(state.step) == 4 and saved_steps(tmp_path)[-1] == 4
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [4]


def test_readers_that_end_without_a_signal_end_the_run(tmp_path):
    def fail(number):
        if number == 5:
            raise UserError("a reader process ended (SIGKILL)")

    with pytest.raises(UserError, match="SIGKILL"):
        run_loop(tmp_path, on_batch=fail)


@pytest.fixture
def several_processes(monkeypatch):
    """Lets the loop agree as with several processes, whose answers take two steps."""

    class Agreement(parallel.Agreement):
        def __init__(self, mesh):
            super().__init__(mesh)
            self.is_alone = False

    monkeypatch.setattr(parallel, "Agreement", Agreement)


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock of training; the attribute `seconds` may be set forward."""
    clock = SimpleNamespace(seconds=0.0)

    def monotonic():
        clock.seconds += 1e-3  # rates are divided by a time
        return clock.seconds

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=monotonic))
    return clock


def test_several_processes_stop_within_two_steps(several_processes, tmp_path):
    def send(number):
        if number == 3:
            signal.raise_signal(signal.SIGTERM)

    state = run_loop(tmp_path, on_batch=send)
    assert int(state.step) == 5 and saved_steps(tmp_path)[-1] == 5


def forward(clock, **minutes):
    """Returns what sets a clock forward in some steps, `step_3=15` by 15 minutes in step 3."""

    def on_batch(number):
        clock.seconds += 60 * minutes.get(f"step_{number}", 0)

    return on_batch


def test_a_run_saves_by_the_clock_and_by_steps(clock, tmp_path):
    # Step 1 compiles. After the save of step 4 the time starts anew.
    on_batch = forward(clock, step_1=99, step_2=8, step_3=6, step_4=1, step_5=14, step_6=1)
    run_loop(tmp_path, on_batch=on_batch, steps=9, checkpoint__every=8)
    assert saved_steps(tmp_path) == [4, 6, 8, 9]


def test_several_processes_save_once_after_the_clock(clock, several_processes, tmp_path):
    on_batch = forward(clock, step_2=15)
    run_loop(tmp_path, on_batch=on_batch, checkpoint__every=100)
    assert saved_steps(tmp_path) == [4, 8]


def test_without_minutes_a_run_saves_by_steps_only(clock, tmp_path):
    on_batch = forward(clock, step_3=1e9)
    run_loop(tmp_path, on_batch=on_batch, checkpoint__every=6, checkpoint__minutes=0)
    assert saved_steps(tmp_path) == [6, 8]


@pytest.fixture
def validations(monkeypatch):
    """Replaces evaluation by one call of the model.

    `on_call` may send a signal before it, and `scores` are the results.
    """
    calls = SimpleNamespace(on_call=lambda: None, count=0, scores=[])

    def encode(images):
        calls.count += 1

    model = Model("toy", (1, 1), 0, 8, encode, encode, encode, encode)

    def evaluate_model(model, config, split, folder=None, check_stop=lambda: None):
        calls.on_call()
        model.encode_image(np.zeros((1, 8, 8, 1), np.uint8))
        return Result({"retrieval/i2t_r5": calls.scores.pop(0) if calls.scores else 0.5})

    monkeypatch.setattr(train, "make_model", lambda *_: model)
    monkeypatch.setattr(evaluate, "evaluate_model", evaluate_model)
    return calls


@pytest.mark.parametrize("best", ["", "retrieval/i2t_r5"])
def test_a_validation_that_a_signal_prevents_is_made_up_for(best, validations, tmp_path):
    options = {"eval__every": 4, "checkpoint__best": best, "checkpoint__every": 100}
    validations.on_call = lambda: signal.raise_signal(signal.SIGTERM)
    state = run_loop(tmp_path, **options)
    assert int(state.step) == 4 and saved_steps(tmp_path) == [4] and not validations.count
    validations.on_call = lambda: None
    run_loop(tmp_path, start=4, **options)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert rows[0] == '{"step": 4, "retrieval/i2t_r5": 0.5}' and validations.count == 1
    assert saved_steps(tmp_path) == [4, 8]
    assert (tmp_path / checkpoint.FOLDER / "4" / "metrics").exists() == bool(best)


def test_saves_by_the_clock_keep_the_best_checkpoint(clock, validations, tmp_path):
    validations.scores = [0.9, 0.1]
    run_loop(
        tmp_path,
        on_batch=lambda number: setattr(clock, "seconds", clock.seconds + 900),
        eval__every=3,
        checkpoint__best="retrieval/i2t_r5",
        checkpoint__every=100,
        checkpoint__keep=2,
    )
    assert saved_steps(tmp_path) == [3, 7, 8] and validations.count == 2


# A whole run ------------------------------------------------------------------------------------


@pytest.fixture
def whole_runs(monkeypatch):
    """Returns what trains in a folder and returns the last metrics, and what to do after steps.

    All runs share one state and one step, which may be traced once, and are not evaluated.
    """
    content = testing.get_config().to_dict() | CONVIRT
    content["data"]["builder"] |= {"train": 16}
    content["checkpoint"]["every"] = 100
    content["parallel"]["devices"] = 1
    after_step, shared = {}, {}

    def share(module, name):
        make = getattr(module, name)

        def make_once(first, *args, **options):
            if name not in shared:
                first = chex.assert_max_traces(first, n=1) if name == "parallelise" else first
                shared[name] = make(first, *args, **options)
            return shared[name]

        monkeypatch.setattr(module, name, make_once)

    def advance(logger, advance=Logger.advance):
        advance(logger)
        after_step.get(logger.bar.n, lambda: None)()

    def fingerprint(run, state):
        return {"params_sha256": checkpoint.fingerprint(state.params)}

    share(parallel, "parallelise")
    share(train, "init_state")
    monkeypatch.setattr(Logger, "advance", advance)
    monkeypatch.setattr(train, "finish", fingerprint)

    def run(folder):
        content["data"]["dir"] = str(folder.parent / "data")
        return train.train(Config.from_dict(content), folder)

    return run, after_step


def test_saves_by_the_clock_change_no_result(clock, whole_runs, tmp_path):
    """A run that is saved by the clock, ended at once and resumed ends like another one."""
    run, after_step = whole_runs
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    expected = run(whole)
    after_step[3] = lambda: forward(clock, step_3=15)(3)
    after_step[5] = lambda: signal.default_int_handler(signal.SIGINT, None)  # a second Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        run(ended)
    assert saved_steps(ended) == [3]
    del after_step[5]
    after_step[4] = lambda: signal.raise_signal(signal.SIGTERM)
    assert run(ended) == {} and saved_steps(ended) == [3, 4]
    assert run(ended) == expected
    rows = [read_rows(folder / "metrics.jsonl") for folder in (whole, ended)]
    losses, others = ([(row["step"], row["loss"]) for row in table] for table in rows)
    assert losses == others and np.isfinite(losses).all() and len(losses) == 6
    paths = [folder / checkpoint.FOLDER / "6/data/metadata" for folder in (whole, ended)]
    assert paths[0].read_text() == paths[1].read_text()
