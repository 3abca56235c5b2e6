"""Other people's models on the pyramid: the code of the pages as it stands."""

import re

import pytest
import torch
from conftest import page_code

from test_tpdiff import SCALED_LINEAR
from tpdiff import Pyramid, align


@pytest.mark.parametrize("pyramid", ['Pyramid("flow", stages=3)', 'Pyramid("ddim", 3, alphas_cumprod)'])
def test_readme_example_trains_and_samples_a_model_of_the_user_s_own(pyramid):
    network = torch.nn.Conv3d(2, 1, 3, padding=1)
    before = network.weight.clone()

    def model(x, t, k):
        return network(torch.cat([x, t.view(-1, 1, 1, 1, 1).expand_as(x)], 1))

    names = {"torch": torch, "Pyramid": Pyramid, "align": align, "model": model}
    names |= {"alphas_cumprod": SCALED_LINEAR, "videos": torch.randn(3, 5, 1, 7, 4, 4)}
    names |= {"optimizer": torch.optim.AdamW(network.parameters(), 1e-3)}
    code = page_code("videos")
    line, other = re.search(r"^pyramid = (Pyramid.*\))  # or (Pyramid.*\))$", code, re.MULTILINE).groups()
    assert pyramid in (line, other)
    exec(code.replace(line, pyramid), names)
    assert names["clips"].shape == (4, 1, 7, 4, 4) and names["clips"].isfinite().all()
    assert not torch.equal(network.weight, before)
