import copy
import re
import tomllib

import pytest
from pydantic import ValidationError

from sparkir.errors import SparkirError
from sparkir.quant.spec import QuantSpec
from sparkir.recipe import Recipe, differences, from_values, load, shipped
from sparkir.spark.weighting import weighting, weightings

MINIMAL = """
name = "mine"
[data]
train = "a"
test = "b"
scale = 2
[student]
model = "edsr"
[train]
steps = 10
"""
FULL = (
    'baselines = ["ptq", "teacher"]'
    + MINIMAL
    + """
[teacher]
model = "edsr"
options = { width = 32, res_scale = 0.1, nested = { a = [1, 2] } }
weights = "w.pth"
[quant]
weight_bits = 4
[distill]
strength = 20.0
[weighting]
name = "spark-paper"
options = { grid = 4, sigma = 0.1 }
"""
)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def changed(change, text=FULL):
    """The values of `text` with `{"section.key": value}` set; None removes the key."""
    values = tomllib.loads(text)
    for key, value in change.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            del section[last]
        else:
            section[last] = value
    return values


def message_of(change, text=FULL):
    with pytest.raises(SparkirError) as caught:
        from_values(changed(change, text), "mine.toml")
    return str(caught.value)


class TestShipped:
    @pytest.mark.parametrize("name", shipped())
    def test_loads_and_says_what_it_is_for(self, name):
        recipe = load(name)
        assert recipe.name == name
        assert recipe.description == shipped()[name] != ""

    @pytest.mark.parametrize("name", shipped())
    def test_round_trip(self, name, write):
        recipe = load(name)
        again = load(write(recipe.to_toml()))
        assert again == recipe
        assert differences(recipe, again) == []

    @pytest.mark.parametrize("name", shipped())
    def test_options_of_its_weighting_exist(self, name):
        choice = load(name).weighting
        weighting(choice.name, **choice.options)

    def test_some_are(self):
        assert "demo" in shipped()


class TestToml:
    @pytest.mark.parametrize("text", [MINIMAL, FULL])
    def test_round_trip(self, text, write):
        recipe = load(write(text))
        assert load(write(recipe.to_toml())) == recipe

    def test_round_trip_of_ranges(self, write):
        recipe = load(
            write(MINIMAL),
            ["data.degradation=noise", "data.scale=1", "data.sigma=[5, 50]", "data.test_sigma=30"],
        )
        assert (recipe.data.sigma, recipe.data.test_sigma) == ((5.0, 50.0), 30)
        assert load(write(recipe.to_toml())) == recipe

    def test_writes_every_default_and_leaves_out_what_there_is_not(self, write):
        text = load(write(MINIMAL)).to_toml()
        written = tomllib.loads(text)
        assert written["train"]["learning_rate"] == 2e-4
        assert written["weighting"] == {"name": "uniform", "options": {}}
        assert not {"teacher", "quant", "distill"} & written.keys()

    def test_what_is_read(self, write):
        recipe = load(write(FULL))
        assert recipe.quant == QuantSpec(weight_bits=4)
        assert recipe.baselines == ("ptq", "teacher")
        assert recipe.teacher.options == {"width": 32, "res_scale": 0.1, "nested": {"a": [1, 2]}}
        assert recipe.distill.strength == 20

    def test_whole_numbers_stay_whole(self, write):
        """A policy on a grid of 4.0 x 4.0 cells does not run."""
        options = load(write(FULL)).weighting.options
        assert {name: type(value) for name, value in options.items()} == {
            "grid": int,
            "sigma": float,
        }
        assert weighting("spark-paper", **options).grid == 4

    def test_cannot_be_changed(self, write):
        recipe = load(write(FULL))
        with pytest.raises(ValidationError, match="frozen"):
            recipe.seed = 3
        with pytest.raises(ValidationError, match="frozen"):
            recipe.train.steps = 3


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("key", "nearest"),
        [
            ("sed", "seed"),
            ("traning", "train"),
            ("train.step", "train.steps"),
            ("train.learnig_rate", "train.learning_rate"),
            ("data.patchpx", "data.patch_px"),
            ("student.modle", "student.model"),
            ("teacher.weight", "teacher.weights"),
            ("quant.weight_bit", "quant.weight_bits"),
            ("quant.activations_bits", "quant.activation_bits"),
            ("distill.strenght", "distill.strength"),
            ("weighting.nam", "weighting.name"),
        ],
    )
    def test_nearest_name(self, key, nearest):
        message = message_of({key: 1})
        assert message == f"mine.toml: unknown key '{key}'; did you mean '{nearest}'?"

    def test_nothing_is_near(self):
        message = message_of({"qqqqqq": 1})
        assert "unknown key 'qqqqqq'; known: name, description, seed, data" in message

    @pytest.mark.parametrize("key", ["train.qqqqqq", "student.qqqqqq", "weighting.qqqqqq"])
    def test_nothing_is_near_in_a_section(self, key):
        message = message_of({key: 1})
        assert "did you mean" not in message
        assert "known: " in message

    def test_of_quantization(self):
        message = message_of({"quant.qqqqqq": 1})
        assert "unknown key 'quant.qqqqqq'; known: quant.weight_bits, " in message
        assert "__" not in message

    @pytest.mark.parametrize("seed", [-1, 2**62])
    def test_seeds_that_no_generator_takes(self, seed):
        assert f"seed = {seed}: " in message_of({"seed": seed})

    def test_all_are_named_at_once(self):
        message = message_of({"sed": 1, "train.step": 2})
        assert "'sed'" in message
        assert "'train.step'" in message

    def test_weighting(self):
        assert "did you mean 'spark-paper'?" in message_of({"weighting.name": "sparkpaper"})
        assert "did you mean 'fixed:student_error'?" in message_of(
            {"weighting.name": "fixed:student-error"}
        )
        assert ", ".join(weightings()) in message_of({"weighting.name": "qqqqqq"})


class TestMissingAndWrong:
    @pytest.mark.parametrize(
        "key", ["name", "data", "data.train", "data.test", "student.model", "train", "train.steps"]
    )
    def test_missing(self, key):
        assert message_of({key: None}) == f"mine.toml: {key} is missing"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("name", 3),
            ("seed", "zero"),
            ("data", 3),
            ("data.scale", 5),
            ("data.scale", "two"),
            ("data.patch_px", 7),
            ("data.batch", 0),
            ("data.degradation", "blur"),
            ("student.options", 3),
            ("quant", "w4a4"),
            ("quant.weight_bits", "four"),
            ("quant.weight_bits", 4.5),
            ("quant.learned", "ls"),
            ("distill.norm", "l2"),
            ("distill.strength", 0),
            ("distill.strength", -1),
            ("distill.method", "fitnets"),
            ("distill.feature_strength", 0),
            ("distill.target", "student"),
            ("train.steps", 0),
            ("train.steps", 1.5),
            ("train.steps", "many"),
            ("train.optimizer", "sgd"),
            ("train.learning_rate", 0),
            ("train.learning_rate", -1e-4),
            ("train.learning_rate", float("nan")),
            ("train.schedule", "linear"),
            ("train.warmup", -1),
            ("train.ema", 1.0),
            ("train.ema", -0.1),
            ("train.clip_norm", -1),
            ("train.precision", "float16"),
            ("train.checkpoint_every", 0),
            ("metric", "yuv"),
        ],
    )
    def test_wrong(self, key, value):
        """The message names the file, the key and the value."""
        message = message_of({key: value})
        assert message.startswith(f"mine.toml: {key} = {value!r}: ")

    @pytest.mark.parametrize("key", ["data.sigma", "data.quality"])
    @pytest.mark.parametrize("value", ["much", [1, 2, 3], [1]])
    def test_wrong_range(self, key, value):
        assert message_of({key: value}).startswith(f"mine.toml: {key}")

    def test_wrong_option(self):
        assert "weighting.options.grid" in message_of({"weighting.options.grid": "big"})

    def test_wrong_baseline(self):
        assert "'qat2'" in message_of({"baselines": ["qat2"]})

    @pytest.mark.parametrize("key", ["weight_bits", "activation_bits", "first_last_bits"])
    @pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
    def test_bits_out_of_range(self, key, bits):
        assert f"{key} is {bits}; choose a whole number from 2 to 8" in message_of(
            {f"quant.{key}": bits}
        )

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_bits_in_range(self, bits):
        recipe = from_values(changed({"quant.weight_bits": bits}), "mine.toml")
        assert recipe.quant.weight_bits == bits

    def test_truth_is_no_number(self):
        message_of({"train.steps": True})

    def test_bits_out_of_range_name_the_file(self):
        assert message_of({"quant.weight_bits": 9}).startswith("mine.toml: ")


class TestInconsistent:
    @pytest.mark.parametrize(
        ("change", "fix"),
        [
            ({"teacher": None, "baselines": None}, "distill needs a [teacher]"),
            ({"distill": None}, "add [distill]"),
            ({"quant": None}, "need a [quant]"),
            (
                {"teacher": None, "distill": None, "weighting": None, "quant": None}
                | {"baselines": ["teacher"]},
                'baseline "teacher" needs a [teacher]',
            ),
            (
                {"teacher": None, "distill": None, "weighting": None, "baselines": None}
                | {"student.weights": "teacher"},
                'student.weights = "teacher" needs a [teacher]',
            ),
            ({"teacher.weights": "teacher"}, "is for the student; name a checkpoint"),
            ({"name": "a/b"}, "name = 'a/b' cannot be that of a folder"),
            ({"name": "a\\b"}, "cannot be that of a folder"),
            ({"name": ""}, "name = '' cannot be that of a folder"),
            ({"name": ".."}, "name = '..' cannot be that of a folder"),
            ({"data.scale": None}, "bicubic needs data.scale = 2, 3, 4 or 8"),
            (
                {"distill.method": "fitnet", "distill.target": "truth"},
                'the truth has none of; target = "truth" goes with method = "kd"',
            ),
            ({"distill.feature_strength": 0.1}, 'method = "kd" has none'),
            ({"distill.encoder": "a.b:c"}, 'encoder goes with method = "dckd"'),
        ],
    )
    def test_message_says_what_to_do(self, change, fix):
        message = message_of(change)
        assert message.startswith("mine.toml: ")
        assert fix in message

    @pytest.mark.parametrize("degradation", ["noise", "jpeg"])
    def test_scale_without_a_change_of_size(self, degradation):
        assert "data.scale" in message_of({"data.degradation": degradation})

    def test_features_may_be_all_that_is_imitated(self):
        change = {"distill.method": "fitnet", "distill.strength": 0}
        assert from_values(changed(change), "mine.toml").distill.strength == 0

    def test_parts_that_may_be_missing(self, write):
        recipe = load(write(MINIMAL))
        assert recipe.teacher is recipe.quant is recipe.distill is None


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "read"),
        [
            ("train.steps=100", lambda r: r.train.steps == 100),
            ("train.learning_rate=1e-3", lambda r: r.train.learning_rate == 1e-3),
            ("data.skip_broken=true", lambda r: r.data.skip_broken is True),
            ("data.train=/some where/photos", lambda r: r.data.train == "/some where/photos"),
            ("data.train=photographs:train", lambda r: r.data.train == "photographs:train"),
            (r"data.train=C:\photos", lambda r: r.data.train == r"C:\photos"),
            ('data.train="quoted"', lambda r: r.data.train == "quoted"),
            ("data.train=a=b", lambda r: r.data.train == "a=b"),
            ("description=", lambda r: r.description == ""),
            ("seed=7", lambda r: r.seed == 7),
            ("train.ema=0.5", lambda r: r.train.ema == 0.5),
            ('baselines=["degraded"]', lambda r: r.baselines == ("degraded",)),
            ("quant.weight_bits=2", lambda r: r.quant == QuantSpec(weight_bits=2)),
            ("quant={weight_bits=2}", lambda r: r.quant == QuantSpec(weight_bits=2)),
            ("student.options.width=16", lambda r: r.student.options == {"width": 16}),
        ],
    )
    def test_value_is_toml_or_else_plain_text(self, write, override, read):
        """Sections that the file lacks are made."""
        recipe = load(write(MINIMAL), [override])
        assert read(recipe)
        assert not read(load(write(MINIMAL))) or override == "description="

    def test_later_ones_win(self, write):
        assert load(write(FULL), ["train.steps=1", "train.steps=2"]).train.steps == 2

    def test_leave_the_rest_alone(self, write):
        before, after = load(write(FULL)), load(write(FULL), ["weighting.options.sigma=0.3"])
        assert differences(before, after) == ["weighting.options.sigma: 0.1 -> 0.3"]

    @pytest.mark.parametrize("override", ["train.steps", "=3", ""])
    def test_not_of_the_form(self, write, override):
        with pytest.raises(SparkirError, match="is not of the form key=value"):
            load(write(FULL), [override])

    def test_below_a_value(self, write):
        with pytest.raises(SparkirError, match="steps holds a value, not a section"):
            load(write(FULL), ["train.steps.more=3"])

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.step=3", "did you mean 'train.steps'"),
            ("train.steps=many", "train.steps = 'many'"),
            ("quant.weight_bits=9", "weight_bits is 9"),
            ("trian.steps=3", "did you mean 'train'"),
        ],
    )
    def test_are_checked(self, write, override, message):
        with pytest.raises(SparkirError, match=re.escape(message)):
            load(write(FULL), [override])


class TestFiles:
    def test_by_name_or_path(self, write, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = write(MINIMAL)
        assert load(path) == load(str(path)) == load("mine.toml")
        assert load("demo").name == "demo"

    def test_as_some_editors_write_it(self, write):
        assert load(write("\ufeff" + FULL)).name == "mine"

    def test_unknown_name(self):
        with pytest.raises(SparkirError, match=r"no recipe file dmo; .*did you mean 'demo'"):
            load("dmo")
        with pytest.raises(SparkirError, match=r"known: .*demo"):
            load("runs/qqqqqqqqqqqqqqqq")

    def test_broken_toml(self, write):
        with pytest.raises(SparkirError, match=r"mine\.toml is not valid TOML: .*line 2"):
            load(write("name = 1\nsteps = = 2"))

    def test_not_text(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SparkirError, match="cannot read the recipe"):
            load(path)

    def test_folder(self, tmp_path):
        with pytest.raises(SparkirError, match="no recipe file"):
            load(tmp_path)


class TestDifferences:
    @staticmethod
    def recipe(change, text=FULL) -> Recipe:
        return from_values(changed(change, text), "mine.toml")

    def test_none(self):
        assert differences(self.recipe({}), self.recipe({})) == []

    def test_values_and_options(self):
        old = self.recipe({})
        new = self.recipe({"train.steps": 20, "teacher.options.width": 8, "seed": 1})
        assert differences(old, new) == [
            "seed: 0 -> 1",
            "teacher.options.width: 32 -> 8",
            "train.steps: 10 -> 20",
        ]

    def test_another_description_is_the_same_recipe(self):
        assert differences(self.recipe({}), self.recipe({"description": "anything"})) == []

    def test_of_a_list(self):
        found = differences(self.recipe({}), self.recipe({"baselines": ["teacher"]}))
        assert found == ["baselines: ['ptq', 'teacher'] -> ['teacher']"]

    def test_of_a_default_written_out(self):
        assert differences(self.recipe({}), self.recipe({"train.warmup": 0})) == []

    def test_of_a_section(self):
        old = self.recipe({}, MINIMAL)
        new = self.recipe({"quant.weight_bits": 4}, MINIMAL)
        found = differences(old, new)
        assert "quant.weight_bits: None -> 4" in found
        assert all(line.startswith("quant") for line in found)
        assert "quant.weight_bits: 4 -> None" in differences(new, old)

    def test_inputs_are_not_changed(self):
        values = changed({})
        before = copy.deepcopy(values)
        from_values(values, "mine.toml")
        assert values == before
