"""Other people's models, finetuned and sampled by examples/: small random ones of the real classes, saved as theirs."""

import gc
import json
import re
import shlex
import shutil
import sys
import warnings
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, animation, fails_with_one_line, rows_of, start_two, tables_of

from cli import SAMPLING, generator_for
from examples import finetune, generate
from examples.families import FAMILIES
from experiments import conversion
from tpdiff import Pyramid

MISSING = "other people's models need: pip install -r tests/requirements.txt"
PACKAGES = ("diffusers", "small_models", "safetensors.torch", "peft", "accelerate", "av")
diffusers, small_models, safetensors, *_ = (pytest.importorskip(package, reason=MISSING) for package in PACKAGES)
each_model = pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "cogvideox-5b", "animatediff"])
CLIPS = "--frames 9 --size 32 48 --device cpu"
RUN = f"--data {{clips}} {CLIPS} --lora 4 --lr 1e-2 --warmup 0 --batch 2 --log-interval 1 --fps 0 --out {{tmp}}/run"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The options that name each small model; folders of clips, with a caption and without; models that are refused."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors gain nothing by more, and lose much on a busy machine
    root = tmp_path_factory.mktemp("places")
    found = {name: " ".join(options) for name, options in small_models.save_all(root / "models").items()}
    two = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
    for name, index in {"ltx": {"_class_name": "LTXPipeline"}, "two": two, "new": {"expand_timesteps": True}}.items():
        (root / name).mkdir()
        (root / name / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | index))
    shutil.copytree(root / "models" / "wan", root / "dynamic")
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.save_pretrained(root / "dynamic" / "scheduler")
    for name, frames, green in (("clips/a", 20, 30), ("clips/b", 9, 200), ("long/a", 45, 0), ("bare/a", 9, 0)):
        animation(root / f"{name}.gif", frames, green=green)
        (root / f"{name}.txt").write_text(f"clip {name}\n")
    (root / "bare" / "a.txt").unlink()
    (root / "latents").mkdir()
    torch.save(torch.randn(16, 9, 32, 48), root / "latents" / "a.pt")
    yield found | {path.name: str(path) for path in root.iterdir()}
    torch.set_num_threads(threads)


@pytest.fixture
def words(places, tmp_path):
    """A command line as words, with what stands in `places` and a new folder {tmp}."""
    return lambda line: line.format(**places, tmp=tmp_path).split()


def finetuned(words: list[str]) -> dict:
    """finetune.py in this process, and the checkpoint it leaves."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main(words)
    assert stopped.value.code == 0
    return torch.load(finetune.make_parser().parse_args(words).out / "checkpoint.pt", weights_only=True)


def prepared(places: dict, name: str, pyramid: str = "time", lora: int = 0):
    """(family, network, pyramid, model, prompt): what the commands make of a small model."""
    line = f"{places[name]} --pyramid {pyramid} --lora {lora} --data {ROOT} --out run"
    args, family = finetune.parse_args(line.split())
    network = finetune.load_trainable(args, family, bf16=False)
    p = generate.make_pyramid(family, args.model, 3, pyramid, None)
    prompt = torch.randn(1, 226 if "cogvideox" in name else 5, 16, generator=torch.Generator().manual_seed(1))
    return family, network, p, generate.make_model(family, network, p), prompt


@each_model
def test_a_model_is_finetuned_resumed_and_sampled(name, places, words, tmp_path, monkeypatch, capsys):
    whole = finetuned(words(f"{{{name}}} {RUN} --steps 4 --out {{tmp}}/whole"))
    finetuned(words(f"{{{name}}} {RUN} --steps 2"))
    shift = json.loads((tmp_path / "run" / "run.json").read_text())["shift"]
    shutil.copytree(places[name].split()[1], tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "encode", None)  # what was encoded stays
        finetuned(words("--resume --out {tmp}/run --steps 3 --model {tmp}/moved"))
        assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == "fp32"  # what "auto" chose
        resumed = finetuned(words("--resume --out {tmp}/run --steps 4 --precision auto"))
    capsys.readouterr()
    for file in (tmp_path / "moved").glob("transformer/*.safetensors"):  # another model of the same shapes
        weights = safetensors.load_file(file)
        finetune.save_tensors({key: tensor + 1 for key, tensor in weights.items()}, file)
        said = fails_with_one_line(capsys, finetune.main, *words("--resume --out {tmp}/run --steps 5"))
        assert f"moved is not the model that {tmp_path}/run was trained on" in said
    assert whole["step"] == resumed["step"] == 4 and whole["weights"].keys() == resumed["weights"].keys()
    assert all("lora_" in key and torch.equal(each, resumed["weights"][key]) for key, each in whole["weights"].items())
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["loss"] > 0 for row in rows)
    assert rows[0].keys() >= {"lr", "clips_per_second", "seconds"} and len(rows[0]["loss_by_stage"]) == 3

    sampling = words("--lora {tmp}/whole --steps 4 --device cpu --prompt cat --out {tmp}/a.gif")
    generate.main(sampling)
    assert (tmp_path / "a.gif").stat().st_size > 500
    whole_rate, half, quarter = (9, 5, 3) if name == "animatediff" else (3, 2, 1)
    cost = 2 * (whole_rate + half + 2 * quarter) / whole_rate  # steps 2, 1, 1; guidance calls twice
    said = capsys.readouterr().out
    assert "9 frames" in said and f"{cost:.4g} network calls on the full clip (twice as many as" in said

    asked = [*sampling, "--shift", str(shift)] if shift else sampling
    args, family = generate.settle(generate.make_parser().parse_args(asked))
    _, network, p, model, prompt = prepared(places, name, lora=4)
    assert shift == (p.shift if p.mode == "flow" else None)
    sampled = generate.make_model(family, generate.load_finetuned(family, args, torch.float32), p)
    inputs = torch.randn(1, 4, 3, 4, 4), torch.tensor([0.5]), 1, prompt
    with torch.no_grad():
        before = model(*inputs)
        network.load_state_dict(whole["weights"], strict=False)
        torch.testing.assert_close(sampled(*inputs), model(*inputs))  # what is sampled is what was trained
        assert (model(*inputs) - before).abs().max() > 1e-3
    file = args.lora / "lora.safetensors"
    layers = safetensors.load_file(file)
    fewer = {key: tensor for key, tensor in layers.items() if ".to_q." not in key}
    for wrong in fewer, layers | {"other." + key: tensor.clone() for key, tensor in layers.items()}:
        finetune.save_tensors(wrong, file)
        with pytest.raises(ValueError, match="whole was trained on another model than .*: their layers differ"):
            generate.load_finetuned(family, args, torch.float32)


def test_the_readme_s_two_commands_finetune_and_sample_a_small_wan(places, tmp_path):
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    here = {"--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers": places["wan"], "--data clips": f"--data {places['clips']}"}
    here |= {"runs/wan": f"{tmp_path}/wan", "cat.mp4": f"{tmp_path}/cat.mp4"}
    tune, make = (re.search(rf"{name} (--.*)", text)[1] for name in ("examples.finetune", "examples.generate"))
    for there, small in here.items():
        assert there in tune + make
        tune, make = tune.replace(there, small), make.replace(there, small)
    finetuned([*shlex.split(tune), *CLIPS.split(), "--steps", "2"])
    generate.main([*shlex.split(make), "--device", "cpu"])
    assert (tmp_path / "cat.mp4").stat().st_size > 500 and b"ftyp" in (tmp_path / "cat.mp4").read_bytes()[:12]  # MP4


@each_model
@pytest.mark.parametrize("lora", [0, 4])
def test_all_weights_or_lora_s_are_finetuned_in_bf16_and_sampled(name, lora, places, words):
    more = "--align nearest --accumulate 2 --pyramid space-time --size 64 64" if lora else "--batch 1 --lr 1e-3"
    after = finetuned(words(f"{{{name}}} {RUN} --precision bf16 --steps 2 --lora {lora} {more}"))["weights"]
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    family, network, *_ = prepared(places, name, lora=lora)
    before = network.state_dict()
    still = [key for key, weight in after.items() if torch.equal(weight, before[key])]
    assert not still  # processes that share gradients wait for each of them
    assert all(any(f"{layer}.lora_B" in key for key in after) for layer in family.lora) or not lora
    generate.main(words("--lora {tmp}/run --prompt cat --steps 3 --precision bf16 --device cpu --out {tmp}/a.gif"))


def test_clips_that_do_not_fit_in_memory_whole_are_decoded_in_tiles(words, monkeypatch, capsys):
    real, held = generate.decode, []

    def decode(vae, latents):
        if not held:
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("full")
        assert vae.use_tiling and held[0]() is None  # or there would be no more room than before
        return real(vae, latents)

    monkeypatch.setattr(generate, "decode", decode)
    generate.main(words(f"{{wan}} --prompt cat --steps 2 {CLIPS} --out {{tmp}}/a.gif"))
    assert "decoded in tiles, as with --tiling" in capsys.readouterr().out


def own_pipeline(places: dict, name: str):
    """The model in diffusers' own pipeline, with a first-order solver of its own over the times that ours takes."""
    _, model, *adapter = places[name].split()
    if adapter:
        motion = diffusers.MotionAdapter.from_pretrained(adapter[1])
        pipeline = diffusers.AnimateDiffPipeline.from_pretrained(model, motion_adapter=motion)
        options = {"clip_sample": False, "timestep_spacing": "trailing"}
        pipeline.scheduler = diffusers.DDIMScheduler(**small_models.SCALED, **options)
    else:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    if name == "wan":
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        sigmas, set_timesteps = [1 - step / 5 for step in range(5)], pipeline.scheduler.set_timesteps
        pipeline.scheduler.set_timesteps = lambda steps, device: set_timesteps(device=device, sigmas=sigmas)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@each_model
def test_one_stage_is_diffusers_own_pipeline_and_the_network_is_gone_when_clips_are_decoded(
    name, places, words, monkeypatch
):
    made, decode, networks = [], generate.decode, {family.network for family in FAMILIES.values()}

    def decode_alone(*args):
        assert not [each for each in gc.get_objects() if type(each).__name__ in networks]
        return decode(*args)

    monkeypatch.setattr(generate, "decode", decode_alone)
    monkeypatch.setattr(generate, "save_gif", lambda clips, path, **_: made.append(clips) or path.touch())
    line = "--size 32 64 --negative-prompt dog --steps 5 --guidance 3 --prompt cat --out {tmp}/a.gif"
    generate.main(words(f"{{{name}}} {CLIPS} {line}"))
    shape = (4, 9, 4, 8) if name == "animatediff" else (4, 3, 4, 8)
    noise = torch.randn(shape, generator=generator_for(0, SAMPLING, 0))[None]
    noise = noise.transpose(1, 2) if "cogvideox" in name else noise
    options = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 5, "guidance_scale": 3.0}
    theirs = own_pipeline(places, name)("cat", negative_prompt="dog", latents=noise, output_type="pt", **options)
    ours = (made[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs.frames, rtol=0, atol=2e-4)


@each_model
def test_encoded_clips_are_decoded_to_what_their_vae_makes_of_them(name, places):
    family, clips = prepared(places, name)[0], torch.rand(1, 3, 9, 32, 48)
    vae = generate.load_part(family.vae, places[name].split()[1], "vae")
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    latents = generate.encode(vae, clips)
    assert {*seen} == {1}  # or a clip's pictures would need gigabytes
    assert latents.shape[2:] == generate.latent_shape(family, vae, Pyramid("flow", 1), 9, (32, 48))
    ours, frames = generate.decode(vae, latents), clips
    if name == "animatediff":  # its VAE is of pictures
        ours, frames = (each[0].transpose(0, 1) for each in (ours, clips))
    with torch.no_grad():
        expected = vae.decode(vae.encode(frames).latent_dist.mode()).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [13, 31])
@each_model
def test_loss_falls_on_one_clip_at_every_stage_whatever_the_frames(name, frames, places):
    torch.manual_seed(0)
    _, network, p, model, prompt = prepared(places, name, lora=8)
    x0, optimizer = torch.randn(1, 4, frames, 4, 4), torch.optim.AdamW(finetune.trained(network).values(), 2e-2)
    for k in range(len(p)):
        noise, losses = torch.randn(p.shape(x0.shape, k)), []
        for _ in range(20):
            losses.append(finetune.training_loss(model, p, k, x0, noise, torch.tensor([0.6]), prompt))
            losses[-1].backward(), optimizer.step(), optimizer.zero_grad()
        assert losses[-1] < 0.95 * losses[0]
    clips = p.sample(generate.guided(model, prompt, prompt, 1), x0.shape, 3)
    assert clips.shape == x0.shape and clips.isfinite().all()


POSITIONS = {  # the kind of layer that knows of positions, and what of its input and output they are
    "wan": ("WanRotaryPosEmbed", lambda inputs, options, output: output),
    "cogvideox-2b": ("CogVideoXPatchEmbed", lambda inputs, options, output: [output[0, 226:]]),
    "cogvideox-5b": ("CogVideoXBlock", lambda inputs, options, output: options["image_rotary_emb"]),
    "animatediff": ("SinusoidalPositionalEmbedding", lambda inputs, options, output: [(output - inputs[0])[0]]),
}


def watch(name: str, network: torch.nn.Module) -> list[torch.Tensor]:
    """A list to which every call of the network on zeros adds what its layers know of where its tokens are."""
    seen, (kind, positions) = [], POSITIONS[name]
    for layer in network.modules():
        if type(layer).__name__ == kind:
            layer.register_forward_hook(lambda _, *words: seen.extend(positions(*words)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("pyramid", ["time", "space-time"])
@each_model
@torch.no_grad()
def test_positions_at_a_stage_are_those_of_the_frames_shown(name, pyramid, places):
    _, network, p, model, prompt = prepared(places, name, pyramid)
    grid, shape, found = (13, 1, 1) if name == "animatediff" else (13, 8, 8), (1, 4, 13, 16, 16), watch(name, network)
    for k in range(len(p)):
        model(torch.zeros(p.shape(shape, k)), torch.ones(1), k, prompt)
        full_rate, at_stage = found[: len(found) // (k + 1)], found[-len(found) // (k + 1) :]
        assert len(at_stage) == len(full_rate) > 0
        for whole, part in zip(full_rate, at_stage, strict=True):
            t, h, w = p[k].stride
            shown = whole.reshape(*grid, -1)[::t, ::h, ::w].flatten(0, 2)
            torch.testing.assert_close(part.reshape(shown.shape), shown, rtol=0, atol=1e-5)
    network.to("meta")  # in place of a GPU: all that the network is given is on its device
    for k in range(len(p)):
        x = torch.zeros(p.shape(shape, k), device="meta")
        assert model(x, torch.ones(1, device="meta"), k, prompt).device.type == "meta"


def test_a_flow_model_that_is_right_at_the_full_rate_is_right_of_still_clips_at_every_stage(places):
    family, network, p, _, prompt = prepared(places, "wan")
    x0, steps = torch.randn(1, 4, 1, 4, 4).expand(-1, -1, 9, -1, -1), []
    for k in range(len(p)):
        noise = torch.randn(p.shape(x0.shape, k))
        known = noise - x0[:, :, : noise.shape[2]]
        call = lambda _network, _x, step, _text, known=known: steps.append(step) or known  # noqa: E731
        knowing = generate.make_model(replace(family, call=call), network, p)
        assert finetune.training_loss(knowing, p, k, x0, noise, torch.rand(1), prompt) < 1e-10
        assert 1000 * p[k].t_end <= steps[-1] <= 1000 * p[k].t_start


def test_a_batch_of_one_takes_the_nearest_noise_and_refuses_to_exchange_any(places):
    line = f"{places['wan']} --data {ROOT} --out run".split()
    for words, align in ([], "nearest"), (["--batch", "2"], "assignment"), (["--align", "none"], "none"):
        assert finetune.parse_args([*line, *words])[0].align == align
    with pytest.raises(ValueError, match="--batch 1 needs --align nearest or none"):
        finetune.parse_args([*line, "--align", "assignment"])


def test_prompts_are_dropped_for_guidance_and_clips_take_turns(tmp_path):
    for number in range(3):
        clip = {"latent": torch.full((4, 3, 2, 2), float(number)), "prompt": torch.full((2, 5), number + 1.0)}
        finetune.save_tensors(clip, tmp_path / f"{number}.safetensors")
    finetune.save_tensors({"prompt": torch.zeros(2, 5)}, tmp_path / "empty.safetensors")
    args = finetune.make_parser().parse_args(["--out", "none"])
    args.candidates = 8
    x0, noise, u, text = finetune.draw(tmp_path, 3, range(300), Pyramid("flow", 3), 1, args)
    clips, prompts = x0[:, 0, 0, 0, 0], text[:, 0, 0]
    turns = clips.view(100, 3).tolist()
    assert all(sorted(turn) == [0, 1, 2] for turn in turns) and len(set(map(tuple, turns))) > 3
    dropped = prompts == 0
    assert 12 <= dropped.sum() <= 50 and torch.equal(prompts[~dropped], clips[~dropped] + 1)
    assert noise.shape == (300, 4, 2, 2, 2) and 0 <= u.min() < u.max() <= 1 and abs(noise.std() - 1) < 0.02


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do():
    scales = {"scale_factor_temporal": 4, "scale_factor_spatial": 8, "temporal_compression_ratio": 4}
    vae = SimpleNamespace(config=SimpleNamespace(**scales, block_out_channels=[1] * 4))
    for name, factor, frames, size, nearest in (
        ("WanPipeline", (1, 2, 2), 81, (480, 832), "--size 448 832"),
        ("WanPipeline", (2, 2, 2), 81, (490, 850), "--size 512 832"),
        ("WanPipeline", (2, 1, 1), 80, (480, 832), "nearest is 81"),
        ("CogVideoXPipeline", (1, 2, 2), 49, (480, 720), "--size 448 704"),
        ("CogVideoXPipeline", (2, 1, 1), 45, (480, 720), "nearest is 49"),
    ):
        with pytest.raises(ValueError, match=nearest):
            generate.latent_shape(FAMILIES[name], vae, Pyramid("flow", 3, factor=factor), frames, size)
    p = Pyramid("flow", 3, factor=(2, 2, 2))
    assert generate.latent_shape(FAMILIES["CogVideoXPipeline"], vae, p, 41, (448, 832)) == (11, 56, 104)
    assert generate.latent_shape(FAMILIES["WanPipeline"], vae, p, 81, (448, 832)) == (21, 56, 104)
    patched = diffusers.CogVideoXTransformer3DModel(2, 16, patch_size_t=2, num_layers=1, text_embed_dim=16)
    with pytest.raises(ValueError, match="CogVideoX 1.5"):
        FAMILIES["CogVideoXPipeline"].tell(patched)


@pytest.mark.parametrize(
    "command, line, said",
    [
        (finetune, f"--model {{ltx}} {RUN}", "is a LTXPipeline, which is not supported: known are WanPipeline"),
        (finetune, f"--model {{two}} {RUN}", "two networks"),
        (finetune, f"--model {{new}} {RUN}", "is a Wan 2.2"),
        (finetune, f"--model {{dynamic}} {RUN}", "time shift that depends on the clip's size"),
        (finetune, f"--model {{models}}/animatediff {RUN}", "--motion-adapter"),
        (finetune, "--out {tmp}/run", "--model and --data"),
        (finetune, f"{{wan}} {RUN} --data {{bare}}", "a.txt"),
        (finetune, f"{{wan}} {RUN} --data {{latents}}", "holds latents"),
        (finetune, f"{{animatediff}} {RUN} --data {{long}} --frames 40", "40 latent frames are more than the 32"),
        (finetune, "--resume --out {tmp}/run", "no checkpoint"),
        (generate, "--prompt cat --lora {tmp} --out {tmp}/a.gif", "no run.json"),
        (generate, "{wan} --prompt cat --out {tmp}/a.avi", ".mp4 or .gif"),
    ],
)
def test_what_cannot_be_finetuned_or_sampled_is_refused(command, line, said, words, capsys):
    assert said in fails_with_one_line(capsys, command.main, *words(line))


def test_clips_that_were_encoded_before_are_refused_by_a_pyramid_that_they_do_not_fit(words, monkeypatch, capsys):
    line = f"{{wan}} {RUN} --steps 1 --size 80"
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "make_state", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            finetune.main(words(line))
    capsys.readouterr()
    assert "--size 64 64" in fails_with_one_line(capsys, finetune.main, *words(f"{line} --pyramid space"))
    monkeypatch.setattr(generate, "encode", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):  # the cache, half written over, is not taken for that of before
        finetune.main(words(f"{{wan}} {RUN} --steps 1 --size 64"))
    with pytest.raises(SystemExit, match="killed"):
        finetune.main(words(line))


def test_encoding_goes_on_where_it_was_stopped(words, tmp_path, monkeypatch):
    line, encode, encoded = f"{{wan}} {RUN} --steps 1", generate.encode, []
    cache = tmp_path / "run" / "cache"
    cache.mkdir(parents=True)
    (cache / "thesis.tex").touch()

    def stopped(vae, clips):
        if len(encoded) == 2:
            sys.exit("killed")
        encoded.append(clips)
        return encode(vae, clips)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "encode", stopped)
        with pytest.raises(SystemExit, match="killed"):
            finetune.main(words(line))
    first = {path: path.stat().st_mtime_ns for path in cache.glob("[0-9]*")}
    finetuned(words(line))
    assert len(first) == 2 and {path: path.stat().st_mtime_ns for path in first} == first
    files = "0.safetensors 1.safetensors 2.safetensors empty.safetensors digest thesis.tex"
    assert {path.name for path in cache.iterdir()} == set(files.split())


def test_what_shares_gradients_in_another_way_is_refused(words, monkeypatch, capsys):
    kinds = generate.library("accelerate.utils").DistributedType
    monkeypatch.setattr(finetune.library("accelerate").Accelerator, "distributed_type", kinds.DEEPSPEED)
    said = fails_with_one_line(capsys, finetune.main, *words(f"{{wan}} {RUN}"))
    assert "accelerate's configuration asks for DEEPSPEED: run accelerate launch --multi_gpu" in said


def test_processes_wait_for_clips_longer_than_for_a_step(words, monkeypatch):
    made = SimpleNamespace(is_initialized=lambda: True, new_group=lambda **options: SimpleNamespace(**options))
    monkeypatch.setattr(finetune, "dist", made)
    accelerator, patient = finetune.make_accelerator(SimpleNamespace(device="cpu"))
    assert accelerator.init_handler.timeout.total_seconds() == 2 * 3600 and patient.backend == "gloo"
    assert patient.timeout.total_seconds() == 24 * 3600


def test_two_processes_train_as_one_with_two_micro_batches(words, tmp_path):
    line = f"{{wan}} {RUN} --batch 1 --steps 3"
    one = finetuned(words(f"{line} --accumulate 2 --out {{tmp}}/one"))
    for process in start_two("-m", "examples.finetune", *words(line)):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    two = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (two["step"], two["world"]) == (3, 2)
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=0, atol=1e-4)


def test_a_prompt_whose_end_is_cut_off_is_told(places):
    family, model = FAMILIES["StableDiffusionPipeline"], places["animatediff"].split()[1]
    pipeline = generate.load_text_encoder(family, model, torch.float32)
    with warnings.catch_warnings(action="error"):
        generate.encode_prompts(family, pipeline, ["abc"], torch.device("cpu"))
    with pytest.warns(UserWarning, match="the end of 'abcdefgh' is cut off: the model takes 8 tokens"):
        generate.encode_prompts(family, pipeline, ["abcdefgh"], torch.device("cpu"))


def test_a_missing_package_says_what_to_install(words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    for command, line in ((finetune, f"{{wan}} {RUN}"), (generate, "{wan} --prompt cat --out {tmp}/a.gif")):
        assert "peft is missing: pip install" in fails_with_one_line(capsys, command.main, *words(line))


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_lacks_memory_or_a_process_is_saved_and_goes_on(lost, words, tmp_path, monkeypatch, capsys):
    optimize, accelerator = finetune.optimize, finetune.library("accelerate").Accelerator
    reduce = accelerator.reduce

    def too_large(state, *rest):
        if state.step == 2 and not lost:
            raise torch.OutOfMemoryError("CUDA out of memory")
        optimize(state, *rest)
        monkeypatch.setattr(accelerator, "reduce", fails if state.step == 2 and lost else reduce)

    def fails(*_):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(finetune, "optimize", too_large)
    with pytest.raises(SystemExit):
        finetune.main(words(f"{{wan}} {RUN} --steps 3"))
    said = "another process of the run has ended ([gloo]" if lost else "not enough memory: a smaller --size"
    assert said in (err := capsys.readouterr().err) and "Traceback" not in err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2  # what was done is saved
    for command, line, said in (
        (finetune, f"{{wan}} {RUN}", "checkpoint.pt is there already: continue with --resume"),
        (finetune, "--resume --out {tmp}/run --lora 8", "--lora 4"),
        (generate, "--prompt cat --lora {tmp}/run --stages 2 --out {tmp}/a.gif", "trained with --stages 3"),
    ):
        assert said in fails_with_one_line(capsys, command.main, *words(line))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    said = fails_with_one_line(capsys, finetune.main, *words(f"{{wan}} {RUN}"))
    assert "lora.safetensors is there already: start a new run with another --out" in said


def test_finetune_converts_a_small_wan_from_vanilla_and_says_what_it_took(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for part, green in (("train", 0), ("train", 250), ("held-out", 100)):
        animation(tmp_path / part / f"{green}" / "clip.webp", 18, (16, 16), green=green)
    monkeypatch.setattr(conversion, "load_efficientnet", lambda: None)
    monkeypatch.setattr(conversion, "picture_features", lambda _, clip: clip.mean((2, 3)).flatten())
    monkeypatch.setattr(conversion, "FINETUNED", (1, 2))
    drawn, draw = [], conversion.draw
    monkeypatch.setattr(conversion, "draw", lambda *args: drawn.append(args) or draw(*args))
    line = f"--data {tmp_path} --steps 3 --batch 2 --number 2 --smoke --runs {tmp_path}/runs --out {tmp_path}/out"
    conversion.main(line.split())
    ((header, rows),) = tables_of(tmp_path / "out" / "conversion.json")
    assert [row[0] for row in rows[:-1]] == ["vanilla", *["converted"] * 3, *["vanilla, continued"] * 2]
    assert [row[1] for row in rows[:-1]] == [3, 0, 1, 2, 1, 2] and len(rows[0]) == len(header)
    assert all(len(row[3].split(", ")) == (3 if row[0] == "converted" else 1) for row in rows[:-1])
    assert (tmp_path / "out" / "conversion.png").exists()
    first_samples = [numbers[0] for _, _, _, numbers, _, dropout in drawn if dropout < 1]  # the others are of losses
    assert first_samples == [0, 2, 4, 6, 8, 6, 8]  # finetuning goes on with new ones, the same on the pyramid and not
    weights = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/[0-9].pt")}
    base, first = (torch.load(tmp_path / "runs" / name)["weights"] for name in ("vanilla/3.pt", "converted/1.pt"))
    changes = [(first[key] - value).abs().max() for key, value in base.items()]
    assert 0 < max(changes) < 1e-5  # it began with the vanilla weights; the first step is a hundredth of the full rate
    monkeypatch.setattr(conversion, "training_loss", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(conversion, "losses", lambda *_: [0.0])
    conversion.main(line.split())
    assert len(weights) == 5 and weights == {path: path.read_bytes() for path in weights}
