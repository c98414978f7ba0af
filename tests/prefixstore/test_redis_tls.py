"""The Redis tier over TLS: with the right certificates, and with wrong ones."""

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis_servers import FLAVOURS, Server
from redis_tiers import PART, get, make_names, open_tier, put, random_bytes

from prefixstore.errors import TierUnavailable

pytestmark = pytest.mark.skipif(
    "redis" not in FLAVOURS, reason="expected redis-server: the other flavour has no TLS"
)


def make_certificates(directory: Path) -> dict[str, Path]:
    """A CA's certificate; certificates with keys: right, expired, and of another CA."""
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


@pytest.fixture
def make_tls_server(server_directory, tmp_path):
    """Starts a server that speaks TLS alone, with one of the certificates."""
    files, servers = make_certificates(tmp_path), []

    def make(certificate: str) -> tuple[str, dict[str, Path]]:
        own, right = str(files[certificate]), str(files["right"])
        options = {"tls-cert-file": own, "tls-key-file": own, "tls-ca-cert-file": str(files["ca"])}
        tls = {"ssl": True, "ssl_cert_reqs": "none", "ssl_certfile": right, "ssl_keyfile": right}
        server = Server(FLAVOURS["redis"], server_directory, options, tls)
        servers.append(server)
        return server.url.replace("redis://", "rediss://"), files

    yield make
    for server in servers:
        server.kill()


def test_tls_with_the_right_certificates(make_tls_server):
    url, files = make_tls_server("right")
    query = f"?tls_ca_file={files['ca']}&tls_cert_file={files['right']}"
    tier = open_tier(url + query)
    names, records = make_names(4), [random_bytes(9 * PART, seed) for seed in range(4)]
    assert put(tier, names, records) == [None] * 4
    assert get(tier, names, 9 * PART) == records
    assert tier.check(fix=True) == []
    tier.close()


@pytest.mark.parametrize("certificate", ["expired", "foreign"])
def test_tls_refuses_a_server_with_a_wrong_certificate(make_tls_server, certificate):
    url, files = make_tls_server(certificate)
    query = f"?tls_ca_file={files['ca']}&tls_cert_file={files['right']}"
    tier = open_tier(url + query)
    with pytest.raises(TierUnavailable, match="certificate"):
        tier.contains_many(make_names(1))
    tier.close()
    careless = open_tier(f"{url}{query}&tls_verify=no")
    assert careless.contains_many(make_names(1)) == [False]
    careless.close()


def test_tls_server_refuses_a_client_without_a_certificate(make_tls_server):
    url, files = make_tls_server("right")
    tier = open_tier(f"{url}?tls_ca_file={files['ca']}")
    with pytest.raises(TierUnavailable):
        tier.contains_many(make_names(1))
    tier.close()
