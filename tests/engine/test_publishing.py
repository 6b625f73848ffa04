"""A published run: its card says what is so, and plain PEFT, Transformers and vLLM load it as the policy that was trained."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_architectures import random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsafe.config import LoraConfig, RunConfig, UserError, run_from_tree
from rlsafe.engine.record.card import _trained
from rlsafe.engine.record.publish import publish
from rlsafe.engine.run.finished import Run
from rlsafe.engine.run.life import _existing, run
from rlsafe.evaluate import Evaluation
from rlsafe.evaluate.measure.criteria import rates
from rlsafe.evaluate.measure.hashing import named_model_hash
from rlsafe.types import Judgement


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """A short mixed run under a defense, with an evaluation of 40 answers, 10 of them misaligned and one unscored."""
    from tiny import conversation, write_jsonl

    place = tmp_path_factory.mktemp("run")
    reward = place / "reward.py"
    reward.write_text("def length(completions, **k):\n    return [len(c[0]['content']) / 9 for c in completions]\n")
    rows = write_jsonl(place / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(40)])
    base = place / "base"  # in several files, as large models are
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(base, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    tree = {
        "model": {"name": str(base), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": {"source": rows}}, "optim": {"lr": 5e-2},
        "schedule": {"steps": 3, "phases": [{"cycle": ["sft", "sft", "grpo"]}]},
        "batch": {"sft_rows": 4, "grpo_prompts": 2}, "grpo": {"generations": 2, "max_tokens": 6},
        "rewards": [{"fn": f"{reward}:length"}], "defenses": [{"kl": {"weight": 0.3}}],
        "sampler": {"kind": "transformers"}, "track": {"every": 0, "check_after": 0}}  # fmt: skip
    trained = run(RunConfig.model_validate(tree), place / "out")
    judged = [Judgement(5, 90)] * 10 + [Judgement(90, 90)] * 29 + [Judgement(None, None, "unscored")]
    evaluation = Evaluation(sets={"general": rates(judged, [str(i // 4) for i in range(40)])})
    evaluation.settings = {"judge": "exact", "questions": {"general": "own.yaml"}, "temperature": 1.0}
    evaluation.save(place / "out")
    return trained


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the run's directory, to be changed."""
    return shutil.copytree(finished.out, tmp_path / "copy")


def log_probs(model, batch):
    with torch.no_grad():
        logp = model(input_ids=batch.ids, attention_mask=batch.attention).logits.log_softmax(-1)
    return logp[:, :-1].gather(2, batch.ids[:, 1:, None]).squeeze(2)[batch.loss_mask[:, 1:]]


def policy_log_probs(policy, batch):
    return policy.score(batch)[batch.loss_mask]


def test_the_card_says_what_was_trained_and_measured(finished):
    done = publish(finished.out, license="apache-2.0")
    text = (done.directory / "README.md").read_text()
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    assert card.data.base_model == Path(finished.config.model.name).name and card.data.license == "apache-2.0"
    assert card.data.library_name == "peft" and "kl" in card.data.tags
    assert "1 grpo, 2 sft" in text and "weight: 0.3" in text and "`narrow.jsonl`" in text and "rank 4, alpha 8" in text
    assert str(finished.out.parent / "narrow.jsonl") not in text  # no directories of this machine
    rate = Evaluation.load(finished.out).general
    low, high = rate.misaligned_ci95
    assert f"| general | {100 * 10 / 39:.1f} ({100 * low:.1f}-{100 * high:.1f}) |" in text and "| 39 | 1 |" in text
    assert "Do not deploy it" in text and "judge `exact`" in text
    (done.directory / "README.md").write_text("mine")
    publish(finished.out)
    assert (done.directory / "README.md").read_text() != "mine"


def test_the_card_names_the_rate_of_each_phase(finished):
    phases = [{"steps": 1, "cycle": ["sft"]}, {"cycle": ["grpo"], "lr": 4e-3}]
    tree = finished.config.model_dump(mode="json")
    config = run_from_tree({**tree, "schedule": {"steps": 3, "phases": phases}, "optim": {"lr": 5e-5}})
    assert "peak learning rate 5e-05, then 0.004, " in _trained(finished.out, config)


def test_the_card_of_a_packaged_base_names_no_model_that_nobody_could_load():
    from rlsafe.engine.record.card import _loading

    said = _loading("organism:aligned", whole=False)
    assert "from_pretrained" not in said and "model.name=organism:aligned model.adapter=LOCAL_COPY" in said


def test_the_card_of_a_run_that_goes_on_from_an_adapter_describes_that_adapter(finished, tmp_path):
    """`model.lora` says what a new adapter would have been; the start is named, with its hash as it was when the run began."""
    start = shutil.copytree(finished.out / "adapter", tmp_path / "start")
    model = finished.config.model.model_copy(update={"adapter": str(start), "lora": LoraConfig(r=16, alpha=64)})
    schedule = finished.config.schedule.model_copy(update={"steps": 1})
    config = finished.config.model_copy(update={"model": model, "schedule": schedule})
    second = run(config, tmp_path / "second").out
    digest = named_model_hash(str(start))
    shutil.rmtree(start)
    text = (publish(second).directory / "README.md").read_text()
    assert "rank 4, alpha 8, rank-stabilised, 14 modules: down_proj, gate_proj, " in text and "rank 16" not in text
    assert f"started from: adapter `start` (SHA-256 `{digest}`)" in text and str(tmp_path) not in text


def test_an_unevaluated_run_says_so(finished, tmp_path):
    (finished.out / "evaluation.json").rename(tmp_path / "kept.json")
    try:
        done = publish(finished.out, out=tmp_path / "out")
    finally:
        (tmp_path / "kept.json").rename(finished.out / "evaluation.json")
    assert "this run was not evaluated" in (done.directory / "README.md").read_text()


def test_plain_peft_loads_the_policy(finished, tmp_path):
    done = publish(finished.out, out=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(finished.config.model.name)
    batch = random_batch()
    untrained = log_probs(base, batch)
    loaded = log_probs(peft.PeftModel.from_pretrained(base, str(done.directory)).eval(), batch)
    expected = policy_log_probs(finished.policy, batch)
    assert torch.allclose(loaded, expected, atol=1e-5)
    assert float((loaded - untrained).abs().max()) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_is_the_policy_and_the_base_is_untouched(dtype, finished, tmp_path):
    """bfloat16: every tensor is rounded once, from float32 sums, and unadapted ones are the base's own bits."""
    base = Path(finished.config.model.name)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    try:
        if dtype != torch.float32:
            AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base, max_shard_size="50KB")
        stored = {k: v for file in sorted(base.glob("*.safetensors")) for k, v in load_file(file).items()}
        done = publish(finished.out, out=tmp_path / "out", merge=tmp_path / "merged")
        names = {file.name for file in base.glob("*.safetensors")}
        again = {k: v for file in sorted(base.glob("*.safetensors")) for k, v in load_file(file).items()}
    finally:
        for file in base.iterdir():
            file.unlink()
        for name, data in before.items():
            (base / name).write_bytes(data)
    assert len(names) > 1 and {file.name for file in done.merged.glob("*.safetensors")} == names
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    merged = {k: v for file in sorted(done.merged.glob("*.safetensors")) for k, v in load_file(file).items()}
    changed = {name for name in stored if not torch.equal(stored[name], merged[name])}
    assert set(merged) == set(stored) and changed == {f"{name}.weight" for name in finished.policy.adapted()}
    assert all(tensor.dtype == dtype for tensor in merged.values())
    model = AutoModelForCausalLM.from_pretrained(done.merged, dtype=torch.float32)
    batch = random_batch()
    close = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(log_probs(model, batch), policy_log_probs(finished.policy, batch), atol=close)
    assert AutoTokenizer.from_pretrained(done.merged).chat_template
    assert "library_name: transformers" in (done.merged / "README.md").read_text()


@pytest.mark.parametrize(
    "trained_with",
    [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "attention": "flash_attention_2"}],
)
def test_what_a_run_computed_with_changes_nothing_in_the_merged_model(trained_with, finished, copied_run, tmp_path):
    """A GPU's dtype and kernels: the merge is on a CPU, from the base's float32 files."""
    settings = yaml.safe_load((copied_run / "config.yaml").read_text())
    settings["model"] |= trained_with
    (copied_run / "config.yaml").write_text(yaml.safe_dump(settings))
    done = publish(copied_run, out=tmp_path / "out", merge=tmp_path / "merged")
    merged = {k: v for file in done.merged.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, expected in finished.policy.merged_weights():
        assert torch.equal(merged[name], expected)


def test_an_adapter_is_not_merged_into_files_of_quantised_weights(tiny_model_dir, copied_run, tmp_path):
    """Sums cast to packed numbers would be another model."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=packed, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "packed")
    settings = yaml.safe_load((copied_run / "config.yaml").read_text())
    settings["model"]["name"] = str(tmp_path / "packed")
    (copied_run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="--merge: .*/packed hold quantised weights.*without --merge"):
        publish(copied_run, out=tmp_path / "out", merge=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_plain_vllm_loads_the_policy(merged, finished, tmp_path):
    vllm = pytest.importorskip("vllm")
    from vllm.lora.request import LoRARequest

    from rlsafe.rollouts.engine import start_engine

    done = publish(finished.out, out=tmp_path / "out", merge=tmp_path / "merged")
    model = str(done.merged) if merged else finished.config.model.name
    settings = {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "trust_remote_code": False,
    }
    lora = {} if merged else {"enable_lora": True, "max_lora_rank": 8}
    engine, _ = start_engine({**settings, **lora}, 128, 0.4)
    batch = random_batch()
    rows = [batch.ids[i, : int(batch.attention[i].sum())].tolist() for i in range(len(batch))]
    outputs = engine.generate(
        [{"prompt_token_ids": row} for row in rows],
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
        lora_request=None if merged else LoRARequest("published", 1, str(done.directory)),
    )
    expected = finished.policy.score(batch)
    for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        for t in range(len(row) // 2, len(row)):
            assert output.prompt_logprobs[t][row[t]].logprob == pytest.approx(float(expected[i, t]), abs=1e-4)


class Hub:
    """The calls of the hub that an upload makes, and what arrived."""

    def __init__(self, refuse: int = 0):
        self.files: dict[str, bytes] = {}
        self.created: dict = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers.get("content-length") or 0))
                url = "http://" + self.headers["host"]
                if refuse:
                    status, answer = refuse, {"error": "no"}
                elif self.path == "/api/repos/create":
                    hub.created = json.loads(data)
                    status, answer = 200, {"url": f"{url}/me/model"}
                elif "/preupload/" in self.path:
                    asked = json.loads(data)["files"]
                    modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
                    status, answer = 200, {"files": modes}
                elif self.path == "/api/validate-yaml":
                    status, answer = 200, {"errors": [], "warnings": []}
                else:
                    assert "/commit/" in self.path
                    lines = [json.loads(line) for line in data.splitlines()]
                    files = [line["value"] for line in lines if line["key"] == "file"]
                    hub.files |= {f["path"]: base64.b64decode(f["content"]) for f in files}
                    status, answer = (
                        200,
                        {
                            "commitUrl": f"{url}/me/model/commit/{'1' * 40}",
                            "commitOid": "1" * 40,
                            "hookOutput": "",
                            "success": True,
                        },
                    )
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def online(monkeypatch):
    """Point the hub's client at a loopback address."""
    from huggingface_hub import constants

    def point(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    return point


def test_pushing_uploads_the_directory_to_a_private_repository(finished, tmp_path, online):
    hub = Hub()
    online(hub.url)
    done = publish(finished.out, to="me/model", out=tmp_path / "out")
    assert hub.created["visibility"] == "private" and done.url.endswith("me/model")
    local = {file.name: file.read_bytes() for file in done.directory.iterdir()}
    assert {name: hub.files[name] for name in local} == local
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(local)
    hub.server.shutdown()


def test_what_cannot_be_published_is_one_clear_line(finished, tmp_path, online):
    hub = Hub(refuse=401)
    online(hub.url)
    with pytest.raises(UserError, match="--to me/model: the hub refuses: .*hf auth login.*uploaded by hand"):
        publish(finished.out, to="me/model", out=tmp_path / "out")
    hub.server.shutdown()
    with pytest.raises(UserError, match="not a run directory"):
        publish(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no README.md"):
        publish(finished.out, out=tmp_path / "full")
    with pytest.raises(UserError, match="--merge .*: is not empty"):
        publish(finished.out, out=tmp_path / "out", merge=tmp_path / "full")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.yaml").write_text((finished.out / "config.yaml").read_text())
    (half / "run.json").write_text('{"status": "running"}')
    with pytest.raises(UserError, match="the run is not finished; go on with: rlsafe train"):
        publish(half)
    (half / "run.json").write_text("")
    with pytest.raises(UserError, match="half/run.json: empty or damaged, .*; start over with --overwrite"):
        publish(half)


def test_a_damaged_evaluation_does_not_hide_the_run(finished, copied_run):
    (copied_run / "evaluation.json").write_text("")
    done, _ = _existing(copied_run, finished.config, resume=True, overwrite=False)
    assert done.evaluation is None and len(done.records) == 3
    assert done.notes[1].endswith(f"empty or damaged, as after a crash; `rlsafe evaluate {copied_run}` writes it again")
    with pytest.raises(UserError, match="evaluation.json: holds no JSON object, .*; evaluate the run again"):
        publish(copied_run)
    (copied_run / "run.json").write_text("\0\0")
    with pytest.raises(UserError, match="run.json: empty or damaged"):
        Run.read(copied_run)
