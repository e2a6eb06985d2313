"""TensorBoard: a run for each curve and no other, a row of HPARAMS for each finished run, errors in one chart."""

from conftest import curves, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


def test_hyper_parameters_stand_in_the_test_curve_and_make_no_run(undisturbed):
    assert sorted(path.name for path in (undisturbed / "tensorboard").iterdir()) == ["test", "train", "val"]
    events = EventAccumulator(str(undisturbed / "tensorboard" / "test"))
    events.Reload()
    told = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(told["_hparams_/session_start_info"]).session_start_info
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    wanted = {"arch": "resnet", "depth": 8, "shortcut": "A", "iterations": 61, "batch_size": 37, "data": "digits"}
    assert {name: values[name] for name in wanted} == wanted
    experiment = plugin_data_pb2.HParamsPluginData.FromString(told["_hparams_/experiment"]).experiment
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["error", "final/train_error"]
    assert {"_hparams_/session_end_info", *told} == set(told)
    assert set(tags) <= set(events.Tags()["scalars"])


def test_the_row_has_the_final_errors_and_curves_share_a_chart(undisturbed):
    found, lines = curves(undisturbed), metrics(undisturbed)
    last = {line["split"]: line["error"] for line in lines if line["iteration"] == 61}
    assert found["test", "final/train_error"][-1][0] == 61
    assert abs(found["test", "final/train_error"][-1][1] - last["train"]) < 1e-4
    for split in ("train", "val", "test"):
        assert abs(found[split, "error"][-1][1] - last[split]) < 1e-4
