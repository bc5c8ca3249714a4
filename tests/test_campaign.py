"The campaign of campaign.py, whole but for the kills (test_kills.py): the table at its end, and nothing wrong in it."
import pytest

from campaign import PARTS, attempt, table

RESULTS: dict = {}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_answer_is_right(name, tmp_path):
    RESULTS[name] = tried, wrong = attempt(name, PARTS[name], tmp_path)
    if not tried: pytest.skip("cannot be tried here")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_table():
    "At least a hundred bad inputs of the command, and a hundred of the API; the table is shown by `-s`."
    print("\n" + table(RESULTS))
    count = lambda names: sum(tried for name, (tried, _) in RESULTS.items() if name in names)
    commands, api = (count([name for name in PARTS if fits(name)]) for fits in (
        lambda name: name in ("command lines", "specs and notebooks", "ledgers"), lambda name: name.startswith("API")))
    if RESULTS.keys() == PARTS.keys(): assert commands >= 100 and api >= 100
