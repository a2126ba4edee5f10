"""An authority of certificates, and certificates of it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NO_USE = dict.fromkeys(
    (
        "content_commitment",
        "crl_sign",
        "data_encipherment",
        "decipher_only",
        "digital_signature",
        "encipher_only",
        "key_agreement",
        "key_cert_sign",
        "key_encipherment",
    ),
    False,
)
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Certified:
    """Files.

    Attributes:
        certificate: PEM.
        key: of it, PEM.
    """

    certificate: Path
    key: Path


class Authority:
    """Signs certificates.

    Args:
        folder: for files.
        name: its own.

    Attributes:
        file: its certificate.
    """

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signs = {"key_cert_sign": True, "crl_sign": True}
        own = (
            self._build(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{**_NO_USE, **signs}), critical=True)
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(own.sign(self._key, hashes.SHA256())))

    def certify(self, host: str) -> Certified:
        """A certificate for a host, by its name."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        signed = (
            self._build(name, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = Certified(self._folder / f"{host}.pem", self._folder / f"{host}.key")
        files.certificate.write_bytes(_pem(signed))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def _build(self, name: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
