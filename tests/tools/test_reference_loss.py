"""The power law reproduces the published reference losses, and says how well it fits."""

import json

import numpy as np
import pytest

from run.settings import UserError
from tools.reference_loss import ReferenceSettings, fit_power_law, main

N = [6738415616, 13015864320, 68976648192]
LLAMA2 = {  # losses of Llama-2 7B, 13B and 70B  # spec 5
    "cc": [1.7520, 1.6680, 1.4621], "github": [0.6216, 0.5791, 0.4890], "book": [1.9063, 1.8242, 1.6450],
    "stackexchange": [1.4482, 1.3936, 1.2805], "wiki": [1.4844, 1.3945, 1.2118], "arxiv": [1.2637, 1.2109, 1.1148],
    "c4": [1.9219, 1.8486, 1.6848]}
PUBLISHED = {
    373867520: [2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139],
    1345423360: [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251]}


@pytest.mark.parametrize("n", PUBLISHED)
def test_published_losses(n):
    for losses, expected in zip(LLAMA2.values(), PUBLISHED[n]):
        a, b, c, residual = fit_power_law(np.array(N, float), np.array(losses))
        assert a / n**b + c == pytest.approx(expected, abs=6e-5)
        assert residual < 1e-6


def test_residual_of_more_points():
    n = np.array([1e8, 3e8, 1e9, 3e9])
    exact = 400 / n**0.3 + 1.5
    assert fit_power_law(n, exact)[3] < 1e-6
    assert fit_power_law(n, exact + [0.01, -0.01, 0.01, -0.01])[3] > 5e-3


def test_writes_what_the_stages_read(tmp_path):
    (tmp_path / "losses.json").write_text(json.dumps({"n_params": N, **LLAMA2}))
    main(ReferenceSettings(losses=str(tmp_path / "losses.json"), n_params=1345423360, out=str(tmp_path / "out.json")))
    assert json.loads((tmp_path / "out.json").read_text())["cc"] == pytest.approx(1.9643, abs=6e-5)


@pytest.mark.parametrize("table", [[], {"n_params": N}, {"n_params": N[:2], "cc": [1.0, 2.0]}, {"n_params": N, "cc": [1.0]},
                                   {"n_params": N, "cc": [1.0, 2.0, "x"]}, {"n_params": N, "cc": 3}])
def test_refuses_a_table_it_cannot_fit(tmp_path, table):
    (tmp_path / "losses.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"losses\.json"):
        main(ReferenceSettings(losses=str(tmp_path / "losses.json"), n_params=1))
