import wave
from types import SimpleNamespace

import numpy as np
import torch

from dirotq.sources.sound import sound_of, write_sound


def test_a_file_holds_the_samples(tmp_path):
    sound = torch.tensor([[0.0, 0.5, -1.0, 2.0], [1.0, 0.0, 0.0, -0.25]])
    write_sound(tmp_path / "x.wav", sound, 24000)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 24000, 2)
        read = np.frombuffer(file.readframes(4), "<i2").reshape(4, 2).T / 32767
    np.testing.assert_allclose(read, sound.clamp(-1, 1).numpy(), atol=1e-4)


def test_images_make_no_sound():
    assert sound_of(SimpleNamespace(images=[])) is None
    assert sound_of(SimpleNamespace(audio=torch.ones(1, 2, 3).half())).dtype == torch.float32
