"""The augmentation against torchvision: pixels for given parameters, distributions of pixels, and its promises."""
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest, ks_2samp, kstest
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from temp_nce.images import augment
from temp_nce.images.augment import (NORMALIZATION, VIEWS, ViewConfig, ViewParameters, denormalize, draw_parameters,
                              make_views, render_views, shift_hue)

PLAIN = replace(VIEWS["plain"], normalize="none")  # pixels in [0, 1] and nothing random


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Thousands of small images: threads would only wait for each other."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def noise(*shape, seed=0): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))
def close(one, two, atol=1e-5): torch.testing.assert_close(one, two, atol=atol, rtol=0)


def smooth(n, height, width=None, seed=0):
    "Images without sharp edges, as photographs mostly are."
    coarse = torch.rand(n, 3, 5, 5, generator=seeded(seed)) * 255
    fine = T.resize(coarse, [height, width or height], interpolation=v2.InterpolationMode.BICUBIC)
    return fine.round().clamp(0, 255).to(torch.uint8)


def parameters(n_views, batch, **given):
    "Parameters that change nothing but what is given."
    neutral = dict(top=0.0, left=0.0, height=32.0, width=32.0, flip=False,
                   brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, sigma=0.0)
    spread = lambda value: torch.as_tensor(value).expand(n_views, batch).clone()
    return ViewParameters(**{name: spread(value) for name, value in (neutral | given).items()})


def torchvision_crop(image, p, v, b, size, antialias=False):
    "The crop of one view by torchvision."
    crop = T.resized_crop(image / 255, *[int(field[v, b]) for field in p[:4]], [size, size], antialias=antialias)
    return T.horizontal_flip(crop) if p.flip[v, b] else crop


# ---- pixels, for given parameters

@pytest.mark.parametrize("height, width, size", [
    (32, 32, 32), (40, 28, 24), (160, 160, 128), (32, 32, 224), (33, 32, 31)])
def test_crop_resize_and_flip_are_torchvisions(height, width, size):
    images = noise(6, 3, height, width)
    config = replace(PLAIN, size=size, scale=(0.05, 1.0), ratio=(0.5, 2.0), flip=0.5)
    p = draw_parameters(config, 6, height, width, seeded(1), n_views=4)
    views = render_views(images, p, config)
    for v, b in itertools.product(range(4), range(6)):
        close(views[v, b], torchvision_crop(images[b], p, v, b, size), 2e-4)
    assert 0 < p.flip.float().mean() < 1


def test_a_large_image_is_averaged_down():
    images = noise(8, 3, 128, 128)  # the hardest case: every neglected pixel shows
    config = replace(PLAIN, size=32, scale=(0.3, 1.0))
    p = draw_parameters(config, 8, 128, 128, seeded(1), n_views=2)
    views = render_views(images, p, config)
    errors = {}
    for antialias in (True, False):
        theirs = torch.stack([torchvision_crop(images[b], p, v, b, 32, antialias) for v in range(2) for b in range(8)])
        errors[antialias] = (views.flatten(0, 1) - theirs).abs().mean().item()
    assert errors[True] < 0.03 < 0.12 < errors[False]


@pytest.mark.parametrize("name, factor, theirs", [
    *[("brightness", f, T.adjust_brightness) for f in (0.0, 0.6, 1.4)],
    *[("contrast", f, T.adjust_contrast) for f in (0.0, 0.6, 1.4)],
    *[("saturation", f, T.adjust_saturation) for f in (0.0, 0.6, 1.4)],
    *[("hue", f, T.adjust_hue) for f in (-0.5, -0.1, 0.07, 0.5)],
    ("saturation", 0.0, lambda x, _: T.rgb_to_grayscale(x, 3))])
def test_each_colour_operation_alone_is_torchvisions(name, factor, theirs):
    images = noise(5, 3, 32, 32)
    views = render_views(images, parameters(1, 5, **{name: factor}), replace(PLAIN, jitter=1, gray=0.2))[0]
    atol = 2e-3 if name in ("contrast", "saturation") else 2e-5  # torchvision's luma weights sum to 0.9999
    close(views, theirs(images / 255, factor), atol)


@settings(max_examples=30, deadline=None)
@given(*[st.floats(0.6, 1.4)] * 3, st.permutations(range(3)), st.integers(0, 1000))
def test_brightness_contrast_and_saturation_commute_where_nothing_is_cut_off(b, c, s, order, seed):
    images = (noise(2, 3, 32, 32, seed=seed) // 8 + 110).to(torch.uint8)
    x = images / 255
    for k in order: x = [T.adjust_brightness, T.adjust_contrast, T.adjust_saturation][k](x, (b, c, s)[k])
    ours = render_views(images, parameters(1, 2, brightness=b, contrast=c, saturation=s), replace(PLAIN, jitter=1))[0]
    close(ours, x, 1e-3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=20), st.floats(-0.5, 0.5))
def test_hue_is_exact_keeps_value_and_saturation_and_turns_back(pixels, turn):
    pixels = torch.tensor(pixels).T.float() / 255
    turned = torch.stack(shift_hue(*pixels, turn))
    torch.testing.assert_close(turned.amax(0), pixels.amax(0))
    close(turned.amin(0), pixels.amin(0), 1e-6)
    close(torch.stack(shift_hue(*turned, -turn)), pixels, 2e-5)
    close(turned, T.adjust_hue(pixels[:, :, None], turn)[..., 0], 2e-5)


def test_a_third_of_a_turn_permutes_the_channels():
    r, g, b = torch.rand(3, 1000, generator=seeded())
    close(torch.stack(shift_hue(r, g, b, 1 / 3)), torch.stack([b, r, g]), 1e-5)


def test_blur_is_gaussian_and_sigma_zero_changes_nothing():
    images, sigma = smooth(4, 64), torch.tensor([0.0, 0.3, 1.0, 2.0])
    config = replace(PLAIN, size=64, blur=0.5)
    views = render_views(images, parameters(1, 4, height=64.0, width=64.0, sigma=sigma), config)[0]
    close(views[0], images[0] / 255, 1e-6)
    for b in (1, 2, 3):
        theirs = T.gaussian_blur(images[b] / 255, [13, 13], [sigma[b].item()] * 2)
        close(views[b][:, 6:-6, 6:-6], theirs[:, 6:-6, 6:-6], 1e-5)
    flat = torch.full((4, 3, 64, 64), 77, dtype=torch.uint8)
    p = parameters(1, 4, height=64.0, width=64.0, sigma=sigma)
    close(render_views(flat, p, config)[0], flat / 255)


@pytest.mark.parametrize("name", ["simclr-cifar", "lightly-imagenette", "digits"])
def test_normalisation_is_torchvisions(name):
    images, config = smooth(3, VIEWS[name].size), VIEWS[name]
    close(augment.test_view(images, config), T.normalize(images / 255, *NORMALIZATION[config.normalize]), 2e-5)
    close(denormalize(augment.test_view(images, config), config), images / 255, 1e-5)


@pytest.mark.parametrize("height, width, name", [
    (160, 160, "lightly-imagenette"), (200, 160, "lightly-imagenette"), (32, 32, "simclr-cifar"), (32, 32, "msc"),
    (300, 411, "msc"), (31, 45, "digits")])
def test_the_test_view_is_resize_and_centre_crop(height, width, name):
    images, config = noise(2, 3, height, width), replace(VIEWS[name], normalize="none")
    resized = T.resize(images / 255, [config.test_resize or config.size], antialias=True)
    theirs = T.center_crop(resized, [config.size] * 2)
    close(augment.test_view(images, config), theirs, 1e-4)


def test_plain_views_are_test_views():
    images = noise(4, 3, 32, 32)
    for view in make_views(images, "plain", seeded(), n_views=3): close(view, augment.test_view(images, "plain"), 1e-4)


# ---- distributions, on finished pixels

N = 3000
COLUMN = (8 * torch.arange(32, dtype=torch.uint8)).expand(32, 32)
RAMP = torch.stack([COLUMN, COLUMN.T, torch.zeros_like(COLUMN)])  # an image whose colour says where a pixel lies


def boxes(views):
    "Width, height, centre column and centre row of crops of RAMP, in its pixels, and whether they are mirrored."
    x, y = views[:, 0].mean(1) * (255 / 8), views[:, 1].mean(2) * (255 / 8)
    slope = (x[:, 21] - x[:, 10]) * (32 / 11)
    return slope.abs(), (y[:, 21] - y[:, 10]) * (32 / 11), x[:, 15:17].mean(1), y[:, 15:17].mean(1), slope < 0


@pytest.fixture(scope="module")
def crops():
    torch.manual_seed(0)
    crop, flip = v2.RandomResizedCrop(32, antialias=False), v2.RandomHorizontalFlip()
    config = replace(PLAIN, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    theirs = torch.stack([flip(crop(RAMP / 255)) for _ in range(N)])
    ours = make_views(RAMP.expand(N // 2, -1, -1, -1), config, seeded(1)).flatten(0, 1)
    return boxes(theirs), boxes(ours)


def test_crop_share_aspect_and_place_have_torchvisions_distribution(crops):
    (w0, h0, x0, y0, _), (w1, h1, x1, y1, _) = crops
    close(w1, w1.round(), 0.01)  # whole pixels, truly recovered
    pairs = {"share": (w0 * h0, w1 * h1), "aspect": (w0 / h0, w1 / h1), "column": (x0, x1), "row": (y0, y1)}
    for name, (theirs, ours) in pairs.items():
        assert ks_2samp(theirs.round(decimals=3), ours.round(decimals=3)).pvalue > 0.01, name
    assert (w1 * h1 / 1024).min() > 0.07 and (w1 / h1).max() < 1.5 and 0.65 < (w1 / h1).min()
    assert ks_2samp(w0 * h0, 1.06 * w1 * h1).pvalue < 0.01  # the test would see 6 % more area


def test_half_of_the_views_are_mirrored_each_for_itself(crops):
    mirrored = crops[1][-1]
    first, second = mirrored.view(2, -1)
    assert binomtest(int(mirrored.sum()), N).pvalue > 0.001
    assert binomtest(int((first & second).sum()), N // 2, 0.25).pvalue > 0.001


def test_a_crop_that_never_fits_is_the_largest_of_an_allowed_aspect():
    for height, width, box in ((10, 200, (0, 93, 10, 13)), (200, 10, (93, 0, 13, 10))):
        config = replace(PLAIN, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
        p = draw_parameters(config, 50, height, width, seeded())
        assert all((field == value).all() for field, value in zip(p, box))
        theirs = v2.RandomResizedCrop(32, scale=(1, 1)).make_params([torch.zeros(3, height, width)])
        assert theirs == dict(zip(("top", "left", "height", "width"), box))


def test_a_fifth_of_the_views_is_grey():
    colourful = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(N, 3, 4, 4)
    views = make_views(colourful, replace(VIEWS["simclr-cifar"], size=4, normalize="none"), seeded(2), n_views=1)[0]
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
    assert binomtest(int(grey.sum()), N, 0.2).pvalue > 0.001


def halves(top, bottom):
    "A small image with one colour above and one below."
    return torch.tensor([top, top, bottom, bottom], dtype=torch.uint8).T[:, :, None].expand(3, 4, 4).contiguous()


def hue_of(x):
    r, g, b = x[:, :, 0, 0].unbind(1)
    return (torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi)).double()


MEASURES = {  # strength -> an image and what its views tell of the factor
    "brightness": (halves([80, 80, 80], [80, 80, 80]), lambda x: x.mean((1, 2, 3)) / (80 / 255)),
    "contrast": (halves([100, 100, 100], [140, 140, 140]), lambda x: (x[:, 0, 3, 0] - x[:, 0, 0, 0]) / (40 / 255)),
    "saturation": (halves([140, 110, 100], [140, 110, 100]), lambda x: (x[:, 0, 0, 0] - x[:, 2, 0, 0]) / (40 / 255)),
    "hue": (halves([140, 110, 100], [140, 110, 100]), hue_of)}


@pytest.mark.parametrize("name", MEASURES)
def test_jitter_strengths_have_torchvisions_distribution(name):
    image, measure = MEASURES[name]
    strength = {name: 0.1 if name == "hue" else 0.4}
    torch.manual_seed(0)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.RandomApply([v2.ColorJitter(**strength)], p=0.8)])
    config = replace(PLAIN, size=4, jitter=0.8, **{**dict(brightness=0, contrast=0, saturation=0, hue=0), **strength})
    one = measure(torch.stack([theirs(image) for _ in range(N)])).numpy().round(4)
    two = measure(make_views(image.expand(N, -1, -1, -1), config, seeded(3), n_views=1)[0]).numpy().round(4)
    assert ks_2samp(one, two).pvalue > 0.01
    assert ks_2samp(one, two + 0.1 * (two.max() - two.min())).pvalue < 0.01  # would be seen
    untouched = measure(image[None] / 255).numpy().round(4)
    by_chance = 0.8 * 2e-3 / (two.max() - two.min())
    assert binomtest(int((abs(two - untouched) < 1e-3).sum()), N, 0.2 + by_chance).pvalue > 0.001


def test_parameters_are_uniform_and_independent_of_each_other():
    config = replace(VIEWS["simclr-cifar"], jitter=1, gray=0, blur=1)
    p = draw_parameters(config, 20_000, 32, 32, seeded(4), n_views=2)
    ranges = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1), sigma=(0.1, 2.0))
    for name, (low, high) in ranges.items():
        field = getattr(p, name).flatten()
        assert field.min() >= low - 1e-6 and field.max() <= high, name
        assert kstest(field, "uniform", (low, high - low)).pvalue > 0.01, name
    chosen = torch.stack([p.width / p.height, p.flip, *(getattr(p, name) for name in ranges)])  # (7, view, image)
    both = torch.cat([chosen, p.height[None] * p.width]).transpose(0, 1).flatten(0, 1)
    assert (torch.corrcoef(both) - torch.eye(16)).abs().max() < 0.035  # 5 deviations of 1/√20,000


# ---- what is promised

def test_the_same_generator_state_gives_the_same_views_and_torchs_own_stays():
    images, state = noise(9, 3, 32, 32), torch.get_rng_state()
    generator = seeded(5)
    first = make_views(images, "simclr-cifar", generator)
    kept = generator.get_state()
    second = make_views(images, "simclr-cifar", generator)
    assert torch.equal(first, make_views(images, "simclr-cifar", seeded(5))) and not torch.equal(first, second)
    generator.set_state(kept)
    assert torch.equal(second, make_views(images, "simclr-cifar", generator))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    unseeded = make_views(images, "digits")
    torch.manual_seed(1)
    assert torch.equal(unseeded, make_views(images, "digits"))


def test_every_recipe_uses_up_the_generator_alike():
    states = []
    for config in VIEWS.values():
        generator = seeded()
        make_views(noise(3, 3, 32, 32), replace(config, size=16, test_resize=None), generator)
        states.append(generator.get_state())
    assert all(torch.equal(states[0], state) for state in states)


@pytest.mark.parametrize("name", ["simclr-cifar", "lightly-imagenette"])
def test_a_view_depends_on_its_own_image_only_and_pieces_change_nothing(name, monkeypatch):
    config = replace(VIEWS[name], size=32)
    images = noise(10, 3, 40, 40)
    views = make_views(images, config, seeded())
    others = images.clone()
    others[[0, 1, 2, 3, 5, 6, 7, 8, 9]] = 255 - others[[0, 1, 2, 3, 5, 6, 7, 8, 9]]
    assert torch.equal(make_views(others, config, seeded())[:, 4], views[:, 4])
    for piece in (1, 3 * 2 * 32 * 32):
        monkeypatch.setattr(augment, "_PIECE", piece)
        for order in ({}, dict(channels_last=True), dict(dtype=torch.bfloat16, channels_last=True)):
            again = make_views(images, config, seeded(), **order)
            assert torch.equal(again, views.to(again.dtype))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_shape_type_and_memory_order(n_views, pieces, monkeypatch):
    if pieces: monkeypatch.setattr(augment, "_PIECE", 1)
    for dtype, channels_last in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        views = make_views(noise(4, 3, 40, 36), "simclr-cifar", seeded(), n_views, dtype, channels_last)
        assert views.shape == (n_views, 4, 3, 32, 32) and views.dtype == dtype
        memory = torch.channels_last if channels_last else torch.contiguous_format
        assert all(view.is_contiguous(memory_format=memory) for view in [*views, views.flatten(0, 1)])
        bank = augment.test_view(noise(4, 3, 40, 36), "simclr-cifar", dtype, channels_last)
        assert bank.shape == (4, 3, 32, 32) and bank.dtype == dtype and bank.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("name", VIEWS)
def test_autocast_changes_nothing_and_no_gradient_is_recorded(name):
    config = replace(VIEWS[name], size=16, test_resize=None)
    images = noise(3, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16): inside = make_views(images, config, seeded())
    assert torch.equal(inside, make_views(images, config, seeded())) and inside.dtype == torch.float32
    assert not inside.requires_grad


@pytest.mark.parametrize("name", VIEWS)
def test_rendering_compiles_to_one_graph(name):
    torch._dynamo.reset()
    config = replace(VIEWS[name], size=16, test_resize=None)
    images = noise(3, 3, 20, 20)
    p = draw_parameters(config, 3, 20, 20, seeded())
    compiled = torch.compile(render_views, backend="aot_eager", fullgraph=True)
    close(compiled(images, p, config, torch.float32, True), render_views(images, p, config), 1e-4)


@pytest.mark.parametrize("name", VIEWS)
def test_nothing_waits_for_the_device(name):
    "Tensors without data on a make-believe GPU: whatever asked for a value, or mixed devices, would fail."
    with FakeTensorMode():
        images = torch.empty(8, 3, 48, 48, dtype=torch.uint8, device="cuda")
        for generator in (seeded(), None):
            views = make_views(images, name, generator, dtype=torch.bfloat16, channels_last=True)
            assert views.device.type == "cuda" and views.shape == (2, 8, 3, VIEWS[name].size, VIEWS[name].size)
        assert augment.test_view(images, name).device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", VIEWS)
def test_a_gpu_makes_the_same_views_without_waiting(name):
    images = smooth(16, 64)
    here = make_views(images, name, seeded())
    there = images.cuda()
    make_views(there, name, seeded())
    torch.cuda.set_sync_debug_mode("error")
    try: views = make_views(there, name, seeded())
    finally: torch.cuda.set_sync_debug_mode("default")
    close(views.cpu(), here, 0.01)


# ---- bad input

@pytest.mark.parametrize("images, error, says", [
    (torch.zeros(2, 3, 8, 8), TypeError, "images: torch.float32; give torch.uint8"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"images: shape \(3, 8, 8\)"),
    (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ValueError, r"shape \(2, 1, 8, 8\); give \(B, 3, H, W\)")])
def test_images_of_another_kind_are_refused(images, error, says):
    for call in (lambda: make_views(images, "plain"), lambda: augment.test_view(images, "plain")):
        with pytest.raises(error, match=says): call()


@pytest.mark.parametrize("change, says", [
    (dict(size=0), "size: 0"), (dict(scale=(0.5, 0.2)), r"scale: \(0.5, 0.2\)"), (dict(scale=(0, 1)), "scale"),
    (dict(scale=(0.5, 1.5)), "scale"), (dict(ratio=(0, 1)), "ratio"), (dict(sigma=(0, 1)), "sigma"),
    (dict(flip=1.5), "flip: 1.5 came"), (dict(jitter=-0.1), "jitter"), (dict(gray=float("nan")), "gray"),
    (dict(blur=2), "blur"), (dict(brightness=-1), "brightness"), (dict(hue=0.6), "hue: 0.6"),
    (dict(normalize="mnist"), "normalize: 'mnist' came; give one of cifar10"),
    (dict(test_resize=16), "test_resize: 16")])
def test_recipes_out_of_range_are_refused(change, says):
    with pytest.raises(ValueError, match=says): ViewConfig(**change)


def test_unknown_recipes_and_no_views_are_refused():
    image = noise(1, 3, 8, 8)
    with pytest.raises(ValueError, match="config: 'simclr' came; give one of simclr-cifar, .*digits"):
        make_views(image, "simclr")
    with pytest.raises(ValueError, match="n_views: 0"): make_views(image, "plain", n_views=0)
    with pytest.raises(TypeError, match="config: None came; give one of"): augment.test_view(image, None)
    assert {field.name for field in fields(ViewConfig)} >= {"size", "scale", "jitter", "hue", "normalize"}
