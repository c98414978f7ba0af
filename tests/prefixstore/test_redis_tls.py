"""The Redis tier over TLS: with the right certificates, and with wrong ones."""

from pathlib import Path

import pytest
from certificates import make_certificates
from redis_servers import FLAVOURS, Server
from redis_tiers import PART, get, make_names, open_tier, put, random_bytes

from prefixstore.errors import TierUnavailable

pytestmark = pytest.mark.skipif(
    "redis" not in FLAVOURS, reason="expected redis-server: the other flavour has no TLS"
)


@pytest.fixture
def make_tls_server(server_directory, tmp_path):
    """Starts a server that speaks only TLS, with one of the certificates."""
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
