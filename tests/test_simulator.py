"""The simulated sensor, by properties and closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest

from staa.data import load
from staa.simulator import EVENT, Sensor, Simulated, closed_path, moving

TIMES = np.linspace(0, 100_000, 41)


def edge(light=1.0, dark=0.1, size=32):
    """(h, w): dark left of the middle, light right of it, far larger than the sensor."""
    return np.where(np.arange(4 * size) < 2 * size, dark, light)[None, :].repeat(4 * size, 0)


def record(path, image=None, size=8, **sensor):
    film = moving(edge() if image is None else image, path, size, background=0.1)
    return Sensor(size, **sensor).record(film, TIMES[:len(film)])


def straight(pixels, n=41):
    """(n, 2): steadily to the right."""
    return np.stack([np.zeros(n), np.linspace(0, pixels, n)], axis=1)


def test_events_are_in_tonics_dtype():
    from tonic.io import events_struct

    assert EVENT == events_struct and record(straight(3)).dtype == EVENT


def test_no_motion_no_events():
    assert not len(record(np.zeros((41, 2)))) and not len(record(np.zeros((41, 2)), mismatch=0.05))


def test_an_edge_gives_its_log_step_over_the_threshold_in_events():
    for threshold in (0.11, 0.3, 0.7):
        events = record(straight(-4.0), threshold=threshold)  # the light side moves in over four columns
        crossed = int(np.log(1.0 / 0.1) / threshold)
        columns = np.bincount(events["x"], minlength=8)
        assert events["p"].all()
        assert sorted(columns.tolist()) == 4 * [0] + 4 * [8 * crossed]


def test_a_time_stamp_is_where_the_log_intensity_crosses():
    ramp = np.exp(np.linspace(0, 2, 41))[:, None, None] * np.ones((1, 2, 2))  # log intensity rises by 2 in 100 ms
    events = Sensor(2, threshold=0.25).record(ramp, TIMES)
    for pixel in range(4):
        own = events[events["y"] * 2 + events["x"] == pixel]
        np.testing.assert_allclose(own["t"], np.arange(1, len(own) + 1) * 0.25 / 2 * 100_000, atol=1)
        assert len(own) in (7, 8), "the eighth threshold is reached at the very end, give or take rounding"


def test_reversing_the_motion_swaps_polarity():
    path = straight(3.0)
    there, back = record(path), record(path[::-1])
    assert len(there) and not there["p"].any() and back["p"].all()
    pixels = [np.bincount(8 * e["y"] + e["x"], minlength=64).tolist() for e in (there, back)]
    assert pixels[0] == pixels[1]


def test_a_closed_path_over_a_digit_and_its_reverse():
    digits = load("digits-dvs", False)
    film, times = digits.film(3), np.linspace(0, 300_000, 96)
    sensor = Sensor(34, threshold=0.05)
    ahead, back = sensor.record(film, times), sensor.record(film[::-1], times)
    counts = [np.bincount(e["p"], minlength=2) for e in (ahead, back)]
    assert np.allclose(counts[0], counts[1][::-1], rtol=0.05)


def test_event_count_scales_with_the_inverse_threshold():
    film, times = load("digits-dvs", False).film(0), np.linspace(0, 300_000, 96)
    fine, coarse = (len(Sensor(34, threshold=threshold).record(film, times)) for threshold in (0.02, 0.04))
    assert fine / coarse == pytest.approx(2, rel=0.05)


def test_mismatch_is_the_sensors_and_noise_the_recordings():
    sensor = Sensor(64, threshold=0.3, mismatch=0.05, noise=2.0)
    thresholds = sensor.thresholds()
    assert (thresholds == sensor.thresholds()).all()
    assert (thresholds != Sensor(64, 0.3, 0.05, seed=1).thresholds()).any()
    assert thresholds.mean() == pytest.approx(0.3, abs=0.003) and thresholds.std() == pytest.approx(0.05, rel=0.05)
    still = np.ones((41, 64, 64))
    noise = sensor.record(still, TIMES, seed=1)
    assert len(noise) == pytest.approx(2.0 * 64 * 64 * 0.1, rel=0.15)
    assert noise["p"].mean() == pytest.approx(0.5, abs=0.1)
    assert (np.diff(noise["t"]) >= 0).all() and (sensor.record(still, TIMES, seed=1) == noise).all()
    assert len(sensor.record(still, TIMES, seed=2)) != len(noise)


def test_no_threshold_is_below_a_fifth_of_the_nominal_one():
    thresholds = Sensor(64, threshold=0.5, mismatch=5.0).thresholds()
    assert thresholds.min() == pytest.approx(0.1) and 0.4 < (thresholds == thresholds.min()).mean() < 0.55, "half below"


def test_noise_is_as_old_as_the_film():
    noise = Sensor(64, noise=2.0).record(np.ones((41, 64, 64)), 7_000_000 + TIMES)
    since = noise["t"] - 7_000_000
    assert len(noise) == pytest.approx(2.0 * 64 * 64 * 0.1, rel=0.15) and 0 <= since.min() and since.max() <= 100_000
    assert since.mean() == pytest.approx(50_000, rel=0.1)


def test_no_event_lies_outside_its_interval_however_a_threshold_is_rounded():
    """A rise by the whole threshold, of which some fall short by rounding, and then the smallest rise there is."""
    dark = np.random.default_rng(0).uniform(0.1, 1, (32, 32))
    light = dark * np.e
    film = np.stack([dark, light, np.nextafter(light, 9)])
    events = Sensor(32, threshold=1.0).record(film, np.array([0, 1000, 2000]))
    late = events[events["t"] > 1000]
    assert len(events) > 900 and len(late) and 990 <= events["t"].min() and events["t"].max() <= 2000


def test_events_at_one_time_come_in_the_order_of_their_pixels():
    flash = np.stack([np.full((32, 32), level) for level in (0.2, 1.0)])
    events = Sensor(32, threshold=0.3).record(flash, np.array([0, 1000]))
    assert events["t"].tolist() == np.repeat([int(0.3 * k / np.log(5) * 1000) for k in range(1, 6)], 1024).tolist()
    assert (events["y"] * 32 + events["x"] == np.tile(np.arange(1024), 5)).all()


def test_a_path_is_closed_and_its_speed_is_constant():
    path = closed_path(97, 4.0)
    assert (path[0] == path[-1]).all() and abs(path).max() == 4.0
    np.testing.assert_allclose(np.linalg.norm(np.diff(path, axis=0), axis=1), 16 * 2 ** 0.5 / 96)


def test_moving_by_whole_pixels_is_a_shift():
    image = np.random.default_rng(0).uniform(0.2, 1.0, (6, 6))
    film = moving(image, np.array([[0, 0], [1, -2]]), 12, background=0.1)
    np.testing.assert_allclose(film[0, 3:9, 3:9], image, atol=1e-6)
    np.testing.assert_allclose(film[1, 4:10, 1:7], image, atol=1e-6)
    assert film[1].sum() == pytest.approx(image.sum() + (144 - 36) * 0.1, rel=1e-5)


def test_a_recording_is_the_same_twice_and_digits_differ():
    digits = load("digits-dvs", True)
    events, label = digits[5]
    assert (digits[5][0] == events).all() and label == digits.targets[5]
    assert 0 <= events["x"].min() and events["x"].max() < 34 and 0 <= events["t"].min() and events["t"].max() <= 300_000
    assert 2000 < len(events) < 10_000, "near N-MNIST's 4,100"
    assert len(events[events["p"]]) == pytest.approx(len(events) / 2, rel=0.15), "a closed path: as much up as down"
    inside = digits.mask(5)[events["y"], events["x"]].mean()
    assert inside > 1.3 * digits.mask(5).mean(), "events come from the digit"


def flat(*levels, indices=None):
    """Recordings of flat squares of ink, 0 to 255, one a level."""
    images = SimpleNamespace(data=np.stack([np.full((8, 8), level, np.uint8) for level in levels]), targets=[0] * len(levels),
                             indices=np.arange(len(levels)) if indices is None else np.array(indices), classes=["0"])
    return Simulated(images)


def test_each_recording_has_its_own_noise_and_keeps_it_in_a_subset():
    whole, part = flat(0, 0, 0), flat(0, indices=[2])  # without ink all events are noise
    noise = [whole[i][0] for i in range(3)]
    assert all(len(events) == pytest.approx(34 * 34 * 0.3, rel=0.25) for events in noise), "one a pixel and second"
    assert not any(len(a) == len(b) and (a == b).all() for a, b in zip(noise, noise[1:] + noise[:1]))
    assert (part[0][0] == noise[2]).all(), "that of its place in the whole set"


def test_a_mask_is_where_ink_brighter_than_half_passes():
    digits = flat(255, 128, 127)
    # Full ink is 24 x 24 of the sensor's 34 x 34 pixels, and moves once around |y| + |x| = 4.
    beyond = np.maximum(abs(np.arange(34) - 16.5) - 11.5, 0)
    assert (digits.mask(0) == (beyond[:, None] + beyond <= 4)).all() and digits.mask(0).sum() == 24 * 24 + 4 * 24 * 4 + 4 * 6
    assert digits.mask(1).any() and not digits.mask(2).any(), "half of 255 lies between 127 and 128"


@pytest.mark.parametrize("settings, words", [
    (dict(threshold=0.0), "threshold must be above 0"), (dict(mismatch=-1.0), "mismatch must be a finite"),
    (dict(threshold=float("inf")), "threshold must be above 0 and finite, got inf"),
    (dict(mismatch=float("inf")), "mismatch must be a finite"),
    (dict(noise=float("nan")), "noise must be a finite"), (dict(size=0), "size of a sensor must be at least 1")])
def test_a_bad_sensor_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Sensor(**settings)


def test_a_bad_film_is_refused():
    for film, times, words in ((np.zeros((3, 4, 4)), [0, 1, 2], "an intensity must be above 0"),
                               (np.ones((3, 4, 5)), [0, 1, 2], "a film must be"),
                               (np.ones((3, 4, 4)), [0, 2, 1], "rising")):
        with pytest.raises(ValueError, match=words):
            Sensor(4).record(film, np.array(times))
