"""Encryption: opens in its own place with its own key, and nowhere else; keys are never shown."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM as Reference
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tierloom.stages.codecs.contract.decoding import AESGCM, INT8, PLANES, ZSTD
from tierloom.stages.codecs.contract.encode import Encode
from tierloom.stages.codecs.contract.keyring import Keyring, hkdf
from tierloom.stages.codecs.encryption.aesgcm import AesGcm, AesGcmOptions, _place
from tierloom.stages.codecs.lossless.zstd import Zstd, ZstdOptions
from tierloom.stages.codecs.quantized.int8 import Int8
from tierloom.stages.contract.chunks import EncodedFrame
from tierloom.stages.errors import BadObject, ConfigError
from tierloom.stages.ops.decode import Decode, DecodeOptions
from tierloom.stages.options import NoOptions
from tierloom.testing import CodecContract, noise


def key_file(folder: Path, name: str, secret: bytes = b"") -> str:
    path = folder / name
    path.write_bytes(secret or os.urandom(48))
    path.chmod(0o600)
    return str(path)


class TestAesGcm(CodecContract):
    lossless = True
    per_element = 0

    @pytest.fixture(autouse=True)
    def files(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.old, self.new = key_file(tmp_path, "old"), key_file(tmp_path, "new")
        self.keys = Keyring.read([self.new, self.old])

    def encoder(self) -> Encode:
        return AesGcm(AesGcmOptions(keys=[self.new]), None)

    def test_every_frame_is_encrypted_though_it_grows(self) -> None:
        x = noise(2, 1, 40, 2, 64).bfloat16()
        frame, _ = self.there_and_back(x)
        assert frame.codecs == bytes((AESGCM,))
        assert len(frame.data) == frame.raw + 37
        again, _ = self.there_and_back(x)
        assert frame.data[9:] != again.data[9:], "a nonce of its own"

    def test_it_is_aes_gcm_and_hkdf(self) -> None:
        secret = os.urandom(40)
        ours = hkdf(secret, b"salt", b"info", 32)
        theirs = HKDF(algorithm=SHA256(), length=32, salt=b"salt", info=b"info").derive(secret)
        assert ours == theirs
        assert hkdf(secret, b"", b"x", 8) == HKDF(SHA256(), 8, None, b"x").derive(secret)
        x = noise(2, 1, 40, 2, 64).bfloat16()
        frame, _, site = self.encode(x)
        key = self.keys.key(frame.data[1:9], site.header.key)
        plain = Reference(key).decrypt(frame.data[9:21], frame.data[21:], _place(site))
        assert plain == x.view(torch.uint8).numpy().tobytes()

    @pytest.mark.parametrize(
        "other",
        [
            {"key": b"o" * 32}, {"namespace": b"o" * 32}, {"parent": b"o" * 32}, {"tokens": 41},
            {"grain": 32}, {"group": 2}, {"links": b"o" * 32 + b"k" * 32},
            {"token_digest": b"o" * 32},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_frame_opens_in_its_place_only(self, other: dict[str, Any]) -> None:
        frame, shape, site = self.encode(noise(2, 1, 40, 2, 64).bfloat16())
        self.decode(frame, shape, site)
        self.refused(frame, shape, site._replace(header=site.header._replace(**other)))
        self.refused(frame, shape, site._replace(number=1))
        self.refused(frame._replace(codecs=bytes((PLANES, AESGCM))), shape, site)
        geometry = site.header.geometry
        turned = site.header._replace(geometry=replace(geometry, heads=1, dim=128))
        self.refused(frame, shape, site._replace(header=turned))

    def test_every_byte_counts(self) -> None:
        frame, shape, site = self.encode(noise(1, 1, 1, 1, 16).bfloat16())
        for at in range(len(frame.data)):
            bad = bytearray(frame.data)
            bad[at] ^= 1
            self.refused(frame._replace(data=bytes(bad)), shape, site)

    def test_keys_are_rotated(self) -> None:
        before = AesGcm(AesGcmOptions(keys=[self.old]), None)
        x = noise(2, 1, 40, 2, 64).bfloat16()
        self.encoder = lambda: before
        self.there_and_back(x)  # the ring has both
        frame, shape, site = self.encode(x)
        self.refused(frame, shape, site._replace(keys=Keyring.read([self.new])))
        self.refused(frame, shape, site._replace(keys=None))

    def test_the_last_of_a_chain(self) -> None:
        x = noise(2, 1, 40, 2, 64).bfloat16()
        frame, shape, site = self.encode(x)
        packed = Zstd(ZstdOptions(), None).frame(frame, shape, site)
        assert packed is frame, "nothing is done to ciphertext"
        chain: list[Encode] = [Int8(NoOptions(), None), Zstd(ZstdOptions(), None), self.encoder()]
        at = EncodedFrame(x.view(torch.uint8).numpy().tobytes(), frame.raw, b"")
        for codec in chain:
            at = codec.frame(at, shape, site._replace(codecs=at.codecs))
        assert at.codecs in (bytes((INT8, ZSTD, AESGCM)), bytes((INT8, AESGCM)))
        y = self.decode(at, shape, site)
        assert (x.float() - y.float()).norm() / x.float().norm() < 0.01
        self.refused(at._replace(codecs=at.codecs[-1:]), shape, site)

    def test_lengths_that_cannot_be_right(self) -> None:
        frame, shape, site = self.encode(noise(2, 1, 40, 2, 64).bfloat16())
        for cut in (0, 1, 20, 37, len(frame.data) - 1):
            self.refused(frame._replace(data=frame.data[:cut]), shape, site)
        self.refused(frame._replace(data=frame.data + b"x"), shape, site)

    def test_key_files_that_cannot_be_used(self) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            Keyring.read([str(self.folder / "none")])
        short = key_file(self.folder, "short", b"secretsecret")
        with pytest.raises(ConfigError, match="must hold 32") as refused:
            Keyring.read([short])
        assert "secretsecret" not in str(refused.value)
        Path(self.old).chmod(0o640)
        with pytest.raises(ConfigError, match="chmod 600"):
            AesGcm(AesGcmOptions(keys=[self.old]), None)
        with pytest.raises(ConfigError, match="chmod 600"):
            Decode(DecodeOptions(keys=[self.old]), None)
        with pytest.raises(ValueError, match="at least one"):
            AesGcmOptions(keys=[])

    def test_keys_are_shown_nowhere(self) -> None:
        secret = b"the secret of this test, 32 byte"
        path = key_file(self.folder, "seen", secret)
        stage = AesGcm(AesGcmOptions(keys=[path]), None)
        ring = Keyring.read([path])
        for shown in (repr(ring), repr(stage.options), repr(vars(stage)), str(stage)):
            assert "secret of" not in shown
        with pytest.raises(BadObject) as refused:
            ring.key(b"12345678", b"k")
        assert "secret of" not in str(refused.value)
        assert ring.newest not in secret
