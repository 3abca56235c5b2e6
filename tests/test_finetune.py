"""Other people's models, finetuned and sampled by examples/: small random ones of the real classes, saved as theirs."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import animation, fails_with_one_line

from cli import SAMPLING, generator_for
from examples import finetune, generate
from examples.families import FAMILIES
from experiments import conversion
from tpdiff import Pyramid

MISSING = "other people's models need: pip install diffusers==0.42.1 transformers peft accelerate safetensors av"
PACKAGES = ("diffusers", "small_models", "peft", "accelerate", "safetensors", "av")
diffusers, small_models, *_ = (pytest.importorskip(package, reason=MISSING) for package in PACKAGES)
NAMES = ("wan", "cogvideox-2b", "cogvideox-5b", "animatediff")
FRAMES = {"wan": 9, "cogvideox-2b": 9, "cogvideox-5b": 9, "animatediff": 6}
SIZE = (32, 48)
RUN = "--lora 4 --lr 1e-2 --warmup 0 --batch 2 --log-interval 1 --fps 0 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors gain nothing by more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, list[str]]:
    return small_models.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, frames, green in (("a", 20, 30), ("b", 9, 200)):
        animation(folder / f"{name}.gif", frames, green=green)
        (folder / f"{name}.txt").write_text(f"clip {name}\n")
    return folder


def run_options(saved: dict, name: str, clip_folder: Path, out: Path, *more: str) -> list[str]:
    size = [str(length) for length in SIZE]
    data = ["--data", str(clip_folder), "--frames", str(FRAMES[name]), "--size", *size]
    return [*saved[name], *data, *RUN, "--out", str(out), *more]


def finetuned(options: list[str]) -> dict:
    """finetune.py in this process, and the checkpoint it leaves."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options)
    assert stopped.value.code == 0
    return torch.load(Path(options[options.index("--out") + 1]) / "checkpoint.pt", weights_only=True)


def prepared(saved: dict, name: str, stages: int = 3, pyramid: str = "time", lora: int = 0):
    """(family, network, pyramid, model, prompt): what the commands make of a small model."""
    options = [*saved[name], "--stages", str(stages), "--pyramid", pyramid, "--lora", str(lora), "--data", "none"]
    args, family = finetune.parse_args([*options, "--out", "none"])
    network = finetune.load_trainable(args, family, bf16=False)
    p = generate.make_pyramid(family, args.model, stages, pyramid, None)
    prompt = torch.randn(1, 226 if "cogvideox" in name else 5, 16, generator=torch.Generator().manual_seed(1))
    return family, network, p, generate.make_model(family, network, p), prompt


# ---- The commands


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_finetuned_resumed_and_sampled(name, saved, clip_folder, tmp_path, monkeypatch, capsys):
    whole = finetuned(run_options(saved, name, clip_folder, tmp_path / "whole", "--steps", "4"))
    finetuned(run_options(saved, name, clip_folder, tmp_path / "halves", "--steps", "2"))
    monkeypatch.setattr(generate, "encode", None)  # what was encoded stays
    resumed = finetuned(["--resume", "--out", str(tmp_path / "halves"), "--steps", "4"])
    assert whole["step"] == resumed["step"] == 4 and whole["weights"].keys() == resumed["weights"].keys()
    assert all(torch.equal(weight, resumed["weights"][key]) for key, weight in whole["weights"].items())
    assert all("lora_" in key for key in whole["weights"])

    rows = [json.loads(row) for row in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["loss"] > 0 for row in rows)
    assert rows[0].keys() >= {"step", "loss", "loss_by_stage", "lr", "clips_per_second", "seconds"}
    assert all(len(row["loss_by_stage"]) == 3 for row in rows)

    monkeypatch.undo()
    sampling = ["--lora", str(tmp_path / "whole"), "--prompt", "a cat", "--steps", "4", "--device", "cpu"]
    for file in ("cat.mp4", "cat.gif"):
        generate.main([*sampling, "--out", str(tmp_path / file)])
        assert (tmp_path / file).stat().st_size > 500
    frames = [3, 2, 1] if FRAMES[name] == 9 else [6, 3, 2]
    cost = 2 * (frames[0] + frames[1] + 2 * frames[2]) / frames[0]  # steps 2, 1, 1; guidance calls twice
    assert f"{FRAMES[name]} frames" in (said := capsys.readouterr().out) and f"{cost:.4g} full-rate" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_network_that_is_sampled_is_the_one_that_was_trained(name, saved, clip_folder, tmp_path):
    after = finetuned(run_options(saved, name, clip_folder, tmp_path / "run", "--steps", "2"))["weights"]
    words = ["--lora", str(tmp_path / "run"), "--prompt", "cat", "--out", "cat.gif"]
    args, family = generate.settle(generate.make_parser().parse_args(words))
    _, trained, p, model, prompt = prepared(saved, name, lora=4)
    sampled = generate.load_finetuned(family, args, torch.float32)
    x, outputs = torch.randn(1, 4, 3, 4, 4), []
    with torch.no_grad():
        outputs.append(model(x, torch.tensor([0.5]), 1, prompt))
        trained.load_state_dict(after, strict=False)
        outputs.append(model(x, torch.tensor([0.5]), 1, prompt))
        outputs.append(generate.make_model(family, sampled, p)(x, torch.tensor([0.5]), 1, prompt))
    torch.testing.assert_close(outputs[2], outputs[1])
    assert (outputs[1] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_are_finetuned_in_bf16_and_sampled(name, saved, clip_folder, tmp_path):
    options = ["--lora", "0", "--precision", "bf16", "--steps", "1", "--stages", "2", "--batch", "1", "--lr", "1e-3"]
    after = finetuned(run_options(saved, name, clip_folder, tmp_path / "run", *options))["weights"]
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    before = prepared(saved, name)[1].state_dict()
    still = [key for key, weight in after.items() if torch.equal(weight, before[key])]
    assert not still  # processes that share gradients wait for each of them
    generate.main(["--lora", str(tmp_path / "run"), *"--prompt cat --steps 2 --precision bf16 --device cpu".split(),
                   "--out", str(tmp_path / "cat.gif")])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_lora_in_float32_works_beside_weights_in_bf16(name, saved, clip_folder, tmp_path):
    options = "--precision bf16 --steps 2 --align nearest --accumulate 2 --pyramid space-time --size 64 64".split()
    after = finetuned(run_options(saved, name, clip_folder, tmp_path / "run", *options))["weights"]
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(weight.any() for key, weight in after.items() if "lora_B" in key)  # they begin as zeros
    family = finetune.parse_args([*saved[name], "--data", "none", "--out", "none"])[1]
    adapted = {key.split(".lora_")[0] for key in after}
    assert {layer for layer in family.lora if not any(key.endswith(layer) for key in adapted)} == set()


# ---- Against diffusers


def own_pipeline(saved: dict, name: str):
    """The model in diffusers' own pipeline, with a first-order solver of its own over the times that ours takes."""
    model = saved[name][1]
    if name == "animatediff":
        adapter = diffusers.MotionAdapter.from_pretrained(saved[name][3])
        pipeline = diffusers.AnimateDiffPipeline.from_pretrained(model, motion_adapter=adapter)
        pipeline.scheduler = diffusers.DDIMScheduler(
            **small_models.SCALED, clip_sample=False, timestep_spacing="trailing"
        )
    else:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    if name == "wan":
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        sigmas, set_timesteps = [1 - step / 5 for step in range(5)], pipeline.scheduler.set_timesteps
        pipeline.scheduler.set_timesteps = lambda steps, device: set_timesteps(device=device, sigmas=sigmas)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_one_stage_is_diffusers_own_pipeline(name, saved, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(generate, "save_gif", lambda clips, *_, **__: made.append(clips))
    words = [*saved[name], "--prompt", "a cat", "--negative-prompt", "dog", "--steps", "5", "--guidance", "3"]
    words += ["--frames", str(FRAMES[name]), "--size", *map(str, SIZE), "--device", "cpu"]
    generate.main([*words, "--out", str(tmp_path / "cat.gif")])

    frames = FRAMES[name] if name == "animatediff" else 3
    shape = (1, 4, frames, 16, 24) if name == "animatediff" else (1, 4, frames, 4, 6)
    noise = torch.randn(shape[1:], generator=generator_for(0, SAMPLING, 0))[None]
    noise = noise.transpose(1, 2) if "cogvideox" in name else noise
    sizes = {"height": SIZE[0], "width": SIZE[1], "num_frames": FRAMES[name], "num_inference_steps": 5}
    video = own_pipeline(saved, name)(
        "a cat", negative_prompt="dog", guidance_scale=3.0, latents=noise, output_type="pt", **sizes
    ).frames
    ours = (made[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, video, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_encoded_clips_are_decoded_to_what_their_vae_makes_of_them(name, saved):
    family, clips = prepared(saved, name)[0], torch.rand(1, 3, FRAMES[name], *SIZE)
    vae = generate.load_part(family.vae, saved[name][1], "vae")
    latents = generate.encode(vae, clips)
    assert latents.shape[2:] == generate.latent_shape(family, vae, Pyramid("flow", 1), FRAMES[name], SIZE)
    frames = clips[0].transpose(0, 1) if name == "animatediff" else clips
    with torch.no_grad():
        own = vae.decode(vae.encode(frames).latent_dist.mode()).sample
    ours = generate.decode(vae, latents)
    torch.testing.assert_close(ours[0].transpose(0, 1) if name == "animatediff" else ours, own)


# ---- The pyramid


@pytest.mark.parametrize("frames", [13, 21, 31])
@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_clip_at_every_stage_whatever_the_frames(name, frames, saved):
    torch.manual_seed(0)
    _, network, p, model, prompt = prepared(saved, name, lora=8)
    x0, optimizer = torch.randn(1, 4, frames, 4, 4), torch.optim.AdamW(finetune.trained(network).values(), 2e-2)
    for k in range(len(p)):
        noise, losses = torch.randn(p.shape(x0.shape, k)), []
        for _ in range(20):
            losses.append(finetune.training_loss(model, p, k, x0, noise, torch.tensor([0.6]), prompt))
            losses[-1].backward(), optimizer.step(), optimizer.zero_grad()
        assert losses[-1] < 0.95 * losses[0]
    clips = p.sample(generate.guided(model, prompt, prompt, 1), x0.shape, 3)
    assert clips.shape == x0.shape and clips.isfinite().all()


def positions_in(name: str, network: torch.nn.Module, call) -> list[torch.Tensor]:
    """What `call` makes the network's layers know of where its tokens are, each (T, H, W, D) for zeros as input."""
    seen, hooks = [], []
    if name == "wan":
        hooks += [network.rope.register_forward_hook(lambda _, inputs, output: seen.extend(output))]
    elif name == "cogvideox-5b":
        block = network.transformer_blocks[0]
        hooks += [
            block.register_forward_pre_hook(lambda *words: seen.extend(words[2]["image_rotary_emb"]), with_kwargs=True)
        ]
    elif name == "cogvideox-2b":
        hooks += [network.patch_embed.register_forward_hook(lambda _, inputs, output: seen.append(output[0, 226:]))]
    else:
        for module in network.modules():
            if type(module).__name__ == "SinusoidalPositionalEmbedding":
                hooks += [module.register_forward_hook(lambda _, inputs, output: seen.append((output - inputs[0])[0]))]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("pyramid", ["time", "space-time"])
@pytest.mark.parametrize("name", NAMES)
def test_positions_at_a_stage_are_those_of_the_frames_shown(name, pyramid, saved):
    _, network, p, model, prompt = prepared(saved, name, pyramid=pyramid)
    pipeline, x, step = own_pipeline(saved, name), torch.zeros(1, 4, 13, 16, 16), torch.ones(1)
    whole_clip, options = pipeline.unet if name == "animatediff" else pipeline.transformer, {}
    if name == "cogvideox-5b":
        options = {"image_rotary_emb": pipeline._prepare_rotary_positional_embeddings(128, 128, 13, "cpu")}
    rows, frames_first = {"animatediff": 13}.get(name, 1), x.transpose(1, 2) if "cogvideox" in name else x
    call = {"encoder_hidden_states": prompt.repeat_interleave(rows, 0), "timestep": step} | options
    full_rate = positions_in(name, whole_clip, lambda: whole_clip(frames_first, **call))
    grid = (13, 1, 1) if name == "animatediff" else (13, 8, 8)
    for k in range(len(p)):
        t, h, w = p[k].stride
        small = torch.zeros(p.shape(x.shape, k))
        at_stage = positions_in(name, network, lambda k=k, small=small: model(small, step, k, prompt))
        assert len(at_stage) == len(full_rate) > 0
        for whole, part in zip(full_rate, at_stage, strict=True):
            whole = whole.reshape(*grid, -1)[::t, ::h, ::w].flatten(0, 2)
            torch.testing.assert_close(part.reshape(whole.shape), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_network_is_given_is_on_its_device(name, saved):
    _, network, p, model, prompt = prepared(saved, name)
    network.to("meta")  # in place of a GPU
    for k in range(len(p)):
        x = torch.zeros(p.shape((1, 4, 9, 4, 4), k), device="meta")
        assert model(x, torch.ones(1, device="meta"), k, prompt).device.type == "meta"


def test_a_flow_model_that_is_right_at_the_full_rate_is_right_of_still_clips_at_every_stage(saved):
    family, network, p, _, prompt = prepared(saved, "wan")
    x0, steps = torch.randn(1, 4, 1, 4, 4).expand(-1, -1, 9, -1, -1), []
    for k in range(len(p)):
        noise = torch.randn(p.shape(x0.shape, k))

        def call(_network, _x, step, _text, known=noise - x0[:, :, : noise.shape[2]]):
            steps.append(step)
            return known

        knowing = replace(family, call=call)
        loss = finetune.training_loss(generate.make_model(knowing, network, p), p, k, x0, noise, torch.rand(1), prompt)
        assert loss < 1e-10 and 1000 * p[k].t_end <= steps[-1] <= 1000 * p[k].t_start


def test_prompts_are_dropped_for_guidance_and_clips_take_turns(tmp_path):
    for number in range(3):
        clip = {"latent": torch.full((4, 3, 2, 2), float(number)), "prompt": torch.full((2, 5), number + 1.0)}
        finetune.save_tensors(clip, tmp_path / f"{number}.safetensors")
    finetune.save_tensors({"prompt": torch.zeros(2, 5)}, tmp_path / "empty.safetensors")
    args = finetune.make_parser().parse_args(["--out", "none"])
    args.candidates = 8
    x0, noise, u, text = finetune.draw(tmp_path, 3, range(300), Pyramid("flow", 3), 1, args)
    clips, prompts = x0[:, 0, 0, 0, 0], text[:, 0, 0]
    assert all(clips[first : first + 3].sort().values.tolist() == [0, 1, 2] for first in range(0, 300, 3))
    assert len({tuple(clips[first : first + 3].tolist()) for first in range(0, 300, 3)}) > 3
    dropped = prompts == 0
    assert 12 <= dropped.sum() <= 50 and torch.equal(prompts[~dropped], clips[~dropped] + 1)
    assert noise.shape == (300, 4, 2, 2, 2) and 0 <= u.min() < u.max() <= 1 and abs(noise.std() - 1) < 0.02
    again = finetune.draw(tmp_path, 3, range(150, 300), Pyramid("flow", 3), 1, args)
    assert torch.equal(again[2], u[150:]) and torch.equal(again[3], text[150:])


# ---- Errors


def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do():
    for name, pyramid, frames, size, nearest in (
        ("WanPipeline", (1, 2, 2), 81, (480, 832), "--size 448 832"),
        ("WanPipeline", (2, 2, 2), 81, (490, 850), "--size 512 832"),
        ("WanPipeline", (2, 1, 1), 80, (480, 832), "nearest is 81"),
        ("CogVideoXPipeline", (2, 1, 1), 48, (480, 720), "nearest is 49"),
        ("CogVideoXPipeline", (1, 2, 2), 49, (480, 720), "--size 448 704"),
    ):
        scales = {"scale_factor_temporal": 4, "scale_factor_spatial": 8, "temporal_compression_ratio": 4}
        vae = SimpleNamespace(config=SimpleNamespace(**scales, block_out_channels=[1] * 4))
        with pytest.raises(ValueError, match=nearest):
            generate.latent_shape(FAMILIES[name], vae, Pyramid("flow", 3, factor=pyramid), frames, size)
    fits = generate.latent_shape(FAMILIES["WanPipeline"], vae, Pyramid("flow", 3, factor=(2, 2, 2)), 81, (448, 832))
    assert fits == (21, 56, 104)


def index_of(folder: Path, **content) -> str:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(content))
    return str(folder)


def test_a_model_that_is_not_known_is_refused_with_what_is_missing(saved, tmp_path, capsys):
    out = ["--data", tmp_path, "--out", tmp_path / "run"]
    other = index_of(tmp_path / "ltx", _class_name="LTXPipeline")
    said = fails_with_one_line(capsys, finetune.main, "--model", other, *out)
    assert "is a LTXPipeline" in said and "WanPipeline" in said and "a row needs" in said
    two = index_of(tmp_path / "two", _class_name="WanPipeline", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert "two networks" in fails_with_one_line(capsys, finetune.main, "--model", two, *out)
    assert "--motion-adapter" in fails_with_one_line(capsys, finetune.main, *saved["animatediff"][:2], *out)
    assert "--model and --data" in fails_with_one_line(capsys, finetune.main, "--out", tmp_path / "run")
    patched = diffusers.CogVideoXTransformer3DModel(2, 16, patch_size_t=2, num_layers=1, text_embed_dim=16)
    with pytest.raises(ValueError, match="CogVideoX 1.5"):
        FAMILIES["CogVideoXPipeline"].tell(patched)


@pytest.mark.parametrize("command", [finetune, generate])
def test_a_missing_package_says_what_to_install(command, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    more = ["--prompt", "cat"] if command is generate else ["--data", tmp_path]
    words = [*saved["wan"], "--out", tmp_path / "a.gif", *more]
    assert "peft is missing: pip install" in fails_with_one_line(capsys, command.main, *words)


def test_data_that_cannot_be_used_is_refused(saved, tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "run"
    animation(clips / "a.gif", 45)
    words = [*saved["wan"], "--data", clips, "--frames", 9, "--size", 32, "--fps", 0, "--out", out, "--device", "cpu"]
    assert "a.txt" in fails_with_one_line(capsys, finetune.main, *words)
    (clips / "a.txt").write_text("")
    animate = [*saved["animatediff"], *words[2:]]
    said = fails_with_one_line(capsys, finetune.main, *animate, "--frames", 40)
    assert "40 latent frames are more than the 32" in said
    assert "--size 64 64" in fails_with_one_line(capsys, finetune.main, *words, "--pyramid", "space", "--size", 80)
    torch.save(torch.randn(16, 9, 32, 32), clips / "b.pt")
    (clips / "a.gif").unlink()
    assert "holds latents" in fails_with_one_line(capsys, finetune.main, *words)


def test_a_run_is_resumed_as_it_was_and_sampled_as_it_was(saved, clip_folder, tmp_path, monkeypatch, capsys):
    options, out = run_options(saved, "wan", clip_folder, tmp_path / "run", "--steps", "1"), ["--out", tmp_path / "run"]
    assert "no checkpoint" in fails_with_one_line(capsys, finetune.main, "--resume", *out)
    finetuned(options)
    capsys.readouterr()
    assert "--resume continues" in fails_with_one_line(capsys, finetune.main, *options)
    assert "--lora 4" in fails_with_one_line(capsys, finetune.main, "--resume", *out, "--lora", 8)
    sampling, run = ["--prompt", "cat", "--out", tmp_path / "a.gif"], tmp_path / "run"
    said = fails_with_one_line(capsys, generate.main, *sampling, "--lora", run, "--stages", 2)
    assert "trained with --stages 3" in said
    assert "no run.json" in fails_with_one_line(capsys, generate.main, *sampling, "--lora", tmp_path)
    assert ".mp4 or .gif" in fails_with_one_line(capsys, generate.main, *sampling[:3], tmp_path / "a.avi")

    optimize = finetune.optimize

    def too_large(state, *rest):
        if state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        optimize(state, *rest)

    monkeypatch.setattr(finetune, "optimize", too_large)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3", "--device", "cpu"])
    assert stopped.value.code == 2 and "not enough memory: a smaller --size" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2  # what was done is saved


def test_a_run_whose_gradients_stay_broken_ends_with_a_sentence_and_a_few_do_not_count(
    saved, clip_folder, tmp_path, monkeypatch
):
    loss, calls = finetune.training_loss, itertools.count()

    def broken(model, pyramid, k, x0, *rest):
        return loss(model, pyramid, k, x0 * (math.nan if next(calls) % 10 else 1), *rest)

    options = run_options(saved, "wan", clip_folder, tmp_path / "run", "--steps", "25", "--save-interval", "25")
    monkeypatch.setattr(finetune, "training_loss", broken)
    content = finetuned(options)  # nine in a row at most
    assert 15 < content["skipped"] < 25
    monkeypatch.setattr(finetune, "training_loss", lambda *inputs: loss(*inputs) * math.nan)
    with pytest.raises(SystemExit, match="NaN or infinite 10 steps in a row: try a lower --lr"):
        finetune.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "60"])
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in content["weights"].values())


def test_finetune_converts_a_small_wan_from_vanilla_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for part, green in (("train", 0), ("train", 250), ("held-out", 100)):
        animation(tmp_path / part / f"{green}" / "clip.webp", 18, (16, 16), green=green)
    monkeypatch.setattr(conversion, "load_efficientnet", lambda: None)
    monkeypatch.setattr(conversion, "picture_features", lambda _, clip: clip.mean((2, 3)).flatten())
    monkeypatch.setattr(conversion, "FINETUNED", (1, 2))
    drawn, draw = [], conversion.draw
    monkeypatch.setattr(conversion, "draw", lambda *args: drawn.append(args) or draw(*args))
    words = ["--data", str(tmp_path), "--steps", "3", "--batch", "2", "--number", "6", "--smoke"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    conversion.main(words)
    ((header, rows),) = json.loads((tmp_path / "out" / "conversion.json").read_text())["tables"]
    assert [(row[0], row[1]) for row in rows[:-1]] == [
        ("vanilla", 3), ("converted", 0), ("converted", 1), ("converted", 2),
        ("vanilla, trained on", 1), ("vanilla, trained on", 2),
    ]  # fmt: skip
    assert [len(row[3].split(", ")) for row in rows[:-1]] == [1, 3, 3, 3, 1, 1] and len(rows[0]) == len(header)
    assert (tmp_path / "out" / "conversion.png").exists()
    first_samples = [numbers[0] for _, _, _, numbers, _, dropout in drawn if dropout < 1]  # the others are of losses
    assert first_samples == [0, 2, 4, 6, 8, 6, 8]  # finetuning goes on with new ones, the same on the pyramid and not
    weights = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*/[0-9].pt")}
    assert len(weights) == 5
    base, first = (
        torch.load(tmp_path / "runs" / name, weights_only=True) for name in ("vanilla/3.pt", "converted/1.pt")
    )
    changes = [(first["weights"][key] - value).abs().max() for key, value in base["weights"].items()]
    assert 0 < max(changes) < 1e-5  # it began with the vanilla weights; the first step is a hundredth of the full rate
    monkeypatch.setattr(conversion, "training_loss", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(conversion, "losses", lambda *_: [0.0])
    conversion.main(words)
    assert weights == {path: path.read_bytes() for path in weights}
