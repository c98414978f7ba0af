"""Certificates for tests of TLS, made on demand and valid for a day."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificates(directory: Path) -> dict[str, Path]:
    """A CA's certificate, and certificates with keys: valid, expired, and of another CA."""
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)

    def write(name: str, *parts: bytes) -> Path:
        path = directory / f"{name}.pem"
        path.write_bytes(b"".join(parts))
        return path

    def make_ca(name: str):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(subject, subject, key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        return key, subject, builder.sign(key, hashes.SHA256())

    def make_leaf(name: str, ca, until: datetime.datetime) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(ca[1], subject, key.public_key())
        builder = builder.serial_number(2).not_valid_before(now - 3 * day).not_valid_after(until)
        host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([host]), False)
        certificate = builder.sign(ca[0], hashes.SHA256())
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
        return write(name, certificate.public_bytes(pem), secret)

    ca, other_ca = make_ca("ca"), make_ca("other-ca")
    return {
        "ca": write("ca", ca[2].public_bytes(serialization.Encoding.PEM)),
        "right": make_leaf("right", ca, now + day),
        "expired": make_leaf("expired", ca, now - day),
        "foreign": make_leaf("foreign", other_ca, now + day),
    }
