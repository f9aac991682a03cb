"""A config file is read strictly, and what is wrong with it is said in one line that names the place."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

from rayskip.config import JobConfig, Section
from rayskip.config.evaluate import BenchConfig, EvalQualityConfig, SpecBenchConfig
from rayskip.config.file import load_config, load_section
from rayskip.config.train import TrainSkipConfig
from rayskip.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

JOB = """\
name: bench
model: {path: smollm2-135m-instruct}
input: {path: rows.jsonl, messages: messages}
output: {path: out/bench}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_dict_and_a_job_are_as_good_as_a_file(path: Path) -> None:
    job = load_config(path)
    values = yaml.safe_load(path.read_text())
    assert load_config(values) == load_config(job) == job
    overrides = {"sampling.max_tokens": 3, "output.path": Path("elsewhere"), "engine": {"max_batch_rows": 2}}
    changed = load_config(path, ["sampling.max_tokens=3", "output.path=elsewhere", "engine.max_batch_rows=2"])
    for source in (path, values, job, {**values, "model": job.model}):
        assert load_config(source, overrides) == changed
    assert values == yaml.safe_load(path.read_text())


def test_sections_left_out_have_defaults(config: Path) -> None:
    job = load_config(config)
    assert job.model.dtype == "bfloat16"
    assert job.sampling.max_tokens == 128
    assert job.cluster.replica_range == (1, 1)


def test_a_job_comes_back_from_its_own_json(config: Path) -> None:
    job = load_config(config)
    assert JobConfig.model_validate_json(job.model_dump_json()) == job


def test_overrides_are_yaml_and_the_last_one_wins(config: Path) -> None:
    overrides = [
        "sampling.max_tokens=3",
        "sampling.max_tokens=7",
        "cluster.replicas=[1, 2]",
        "sampling.stop=[a=b]",
        "model.revision=null",
    ]
    job = load_config(config, overrides)
    assert job.sampling.max_tokens == 7
    assert job.cluster.replica_range == (1, 2)
    assert job.sampling.stop == ("a=b",)
    assert job.model.revision is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.max_token=3", 'unknown key "sampling.max_token"; did you mean "max_tokens"?'),
        ("samplin.max_tokens=3", 'unknown key "samplin"; did you mean "sampling"?'),
        ("max_tokens=3", 'unknown key "max_tokens"; did you mean "sampling.max_tokens"?'),
        ("zzz=1", 'unknown key "zzz"; known: name, model, input'),
        (
            "decode.draft={kind: lookup, path: x}",
            'unknown key "decode.draft.path"; kinds that have it: kangaroo, medusa, auto; known: kind',
        ),
        (
            "decode.draft=lookup",
            "\"decode.draft\" needs its kind, as in {kind: lookup}, got 'lookup'; known: none",
        ),
        ("decode.draft={path: x}", '"decode.draft" needs its kind, as in {kind: none}; known: none, lookup'),
        ("sampling.max_tokens=many", "\"sampling.max_tokens\" should be an integer, got 'many'"),
        ("sampling.max_tokens=0", '"sampling.max_tokens" should be greater than or equal to 1, got 0'),
        ("sampling=3", '"sampling" is a section with keys such as max_tokens'),
        ("engine=null", '"engine" is a section with keys such as max_batch_rows'),
        ("engine.max_batch_rows=x", "\"engine.max_batch_rows\" should be an integer or null, got 'x'"),
        ("model.dtype=int8", "\"model.dtype\" should be 'bfloat16', 'float32' or 'float16', got 'int8'"),
        ("retry.max_failed_rows=few", '"retry.max_failed_rows" should be an integer or a number or null'),
        ("retry.max_failed_rows=1.5", '"retry.max_failed_rows" should be an integer or less than'),
        ("cluster.replicas=[1, x]", "\"cluster.replicas\" should be an integer or a list, got [1, 'x']"),
        (
            "cluster.replicas=[3, 2]",
            '"cluster.replicas": must be at least 1 and [min, max] in order, got [3, 2]',
        ),
        ("cluster.replicas=0", '"cluster.replicas": must be at least 1 and [min, max] in order, got 0'),
        ("sampling.stop=[a, 3]", '"sampling.stop.1" should be text, got 3'),
        ("sampling.stop=['']", '"sampling.stop": a stop string may not be empty'),
        (
            "input.prompt=text",
            '"input": name one of prompt, messages, prompt_token_ids, template; got prompt',
        ),
        ("decode.draft.kind=kangaro", '"decode.draft.kind" is "kangaro"; did you mean "kangaroo"?'),
        ("decode.draft.kind=zzz", '"decode.draft.kind" is "zzz"; known: none, lookup, '),
        ("input.date=2026-02-30", '"input.date": must be a day such as 2026-11-28, got 2026-02-30'),
        ("input.date=20", '"input.date": must be a day such as 2026-11-28, got 20'),
        ("input.rename={a: 3}", '"input.rename.a" should be text, got 3'),
        ("input.rename={3: a}", '"input.rename.3" should be text, got 3'),
        (
            "decode.skip={kind: layers, layers: [[1, x]]}",
            "\"decode.skip.layers.0.1\" should be an integer, got 'x'",
        ),
        ("name=''", '"name" should be a text that is not empty'),
        ("model={}", 'missing key "model.path" (smollm2-135m-instruct, a local folder'),
    ],
)
def test_a_wrong_key_or_value_is_said_in_one_line(config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config, [override])
    assert str(error.value).startswith(f"{config}: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        (EvalQualityConfig, "runs=[{nmae: a}]", 'unknown key "runs.0.nmae"; did you mean "name"?'),
        (EvalQualityConfig, "runs=[{name: a}]", 'missing key "runs.0.model"'),
        (
            EvalQualityConfig,
            "runs=[3]",
            '"runs.0" is a section with keys such as name, model, skip, got 3',
        ),
        (EvalQualityConfig, "runs=[]", '"runs" should be a list that is not empty, got []'),
        (
            EvalQualityConfig,
            "runs=[{name: a, model: {path: x}}, {name: a, model: {path: y}}]",
            "runs: two are named 'a'; each needs a name of its own",
        ),
        (
            SpecBenchConfig,
            "drafters=[{name: a}, {name: b, decode: {draft: {kind: kangaro}}}]",
            '"drafters.1.decode.draft.kind" is "kangaro"; did you mean "kangaroo"?',
        ),
        (
            SpecBenchConfig,
            "drafters=[{name: a, decode: {draft: {kind: medusa, tokens: 3}}}]",
            'unknown key "drafters.0.decode.draft.tokens"; kinds that have it: lookup, retrieval, lookahead, ',
        ),
        (
            BenchConfig,
            "peers=[{name: a, kind: vlm}]",
            "\"peers.0.kind\" should be 'transformers', 'transformers_batch' or 'vllm', got 'vlm' (",
        ),
        (
            BenchConfig,
            "modes=[{name: a, model: {paht: x}}]",
            'unknown key "modes.0.model.paht"; did you mean "path"?',
        ),
        (BenchConfig, "batch_rows=[x]", "\"batch_rows.0\" should be an integer or null, got 'x'"),
        (TrainSkipConfig, "lora={rnk: 3}", 'unknown key "lora.rnk"; did you mean "rank"?'),
        (TrainSkipConfig, "lora=3", '"lora" is a section with keys such as rank, alpha, got 3'),
    ],
)
def test_a_wrong_key_in_a_list_or_an_optional_section_is_named(
    tmp_path: Path, kind: type[Section], override: str, said: str
) -> None:
    """All other keys are right."""
    keys = {
        EvalQualityConfig: "input: {path: x}\nreferences: r\ngroup: g\n",
        SpecBenchConfig: "model: {path: x}\nquestions: q\n",
        BenchConfig: "model: {path: x}\ninput: {path: x}\nmodes: [{name: a}]\n",
        TrainSkipConfig: "model: {path: x}\ndata: {input: {path: x}, answer: a}\nsteps: 1\n",
    }
    path = tmp_path / "tool.yaml"
    path.write_text(f"name: tool\noutput: out\n{keys[kind]}")
    with pytest.raises(ConfigError) as error:
        load_section(kind, path, [override])
    assert str(error.value).startswith(f"{path}: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "template"),
    [
        ("input.template={{ q }}: {name}", "{{ q }}: {name}"),
        ("input.template=[Q] {{ q }}", "[Q] {{ q }}"),
        ("input={path: a.csv, template: 'Q: {{ q }}'}", "Q: {{ q }}"),
    ],
)
def test_a_template_is_set_as_text_and_within_a_section(config: Path, override: str, template: str) -> None:
    section = ["input={path: a.csv, template: x}", override]
    assert load_config(config, section).input.template == template


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fresh", "expected key=value"),
        ("=3", "expected key=value"),
        ("sampling..seed=3", "expected key=value"),
        ("model.path.x=3", "\"path\" is 'smollm2-135m-instruct', not a section"),
        ("sampling.top_p=[", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_named(config: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config, [override])
    assert str(error.value).startswith(f"--set {override}: {said}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected keys such as name, model, input, sampling, got nothing"),
        ("- name: x\n", "expected keys such as name, model, input, sampling, got a list"),
        ("name: a\nname: b\n", 'line 2: key "name" is given twice'),
        ("name: [a\n", "line 2: "),
        ("name: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        (JOB.replace("output: {path", "output: {paht"), 'unknown key "output.paht"; did you mean "path"?'),
        (JOB.replace("output: ", "outptu: "), 'unknown key "outptu"; did you mean "output"?'),
    ],
)
def test_a_broken_file_is_said_in_one_line(config: Path, text: str, said: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert str(error.value).startswith(f"{config}: {said}")
    assert "\n" not in str(error.value)


def test_a_date_is_text_until_a_key_reads_it(config: Path) -> None:
    job = load_config(config, ["name=2026-02-30", "input.date=2026-11-28"])
    assert (job.name, job.input.date) == ("2026-02-30", datetime.date(2026, 11, 28))
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job


def test_a_merged_key_may_be_overridden(config: Path) -> None:
    config.write_text(
        JOB + "retry: {<<: {max_shard_attempts: 9, shard_timeout_s: 7}, max_shard_attempts: 2}\n"
    )
    retry = load_config(config).retry
    assert (retry.max_shard_attempts, retry.shard_timeout_s) == (2, 7)


def test_a_missing_file_names_the_nearest(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"jbo\.yaml: no such file; did you mean .*job\.yaml\?"):
        load_config(config.with_name("jbo.yaml"))


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)


def test_a_file_that_is_not_text_is_refused(config: Path) -> None:
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(config)
