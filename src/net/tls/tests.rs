//! Handshakes over loopback: who gets in, who does not, and what both ends are told.
//!
//! Role: holds the invariants of `tls`. Neighbours: none but `tls` and `identity`.
//! Invariants: "let in" is a byte that the client received on a stream, never just a finished handshake; nothing here sleeps,
//! and what waits has a bound.

use super::*;
use quinn::{Connection, Endpoint, EndpointConfig, TokioRuntime};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::sign::CertifiedKey;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

type End = Result<Connection, ConnectionError>;

fn endpoint(server: Option<quinn::ServerConfig>) -> Endpoint {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    Endpoint::new(EndpointConfig::default(), server, socket, Arc::new(TokioRuntime)).unwrap()
}

/// One handshake. A client's end is `Ok` only when a byte from the server has arrived.
async fn meet(server: QuicServerConfig, client: QuicClientConfig) -> (End, End) {
    let listener = endpoint(Some(quinn::ServerConfig::with_crypto(Arc::new(server))));
    call(&listener, &endpoint(None), quinn::ClientConfig::new(Arc::new(client))).await
}

async fn call(listener: &Endpoint, caller: &Endpoint, config: quinn::ClientConfig) -> (End, End) {
    let address = listener.local_addr().unwrap();
    let at_server = async {
        let connection = listener.accept().await.unwrap().await?;
        let mut stream = connection.open_uni().await?;
        stream.write_all(b"!").await.unwrap();
        stream.finish().unwrap();
        Ok(connection)
    };
    let at_client = async {
        let connection = caller.connect_with(config, address, SERVER_NAME).unwrap().await?;
        let mut stream = connection.accept_uni().await?;
        assert_eq!(stream.read_to_end(1).await.unwrap(), b"!");
        Ok(connection)
    };
    let both = async { tokio::join!(at_server, at_client) };
    tokio::time::timeout(Duration::from_secs(20), both).await.expect("neither end may wait for ever")
}

/// One handshake between `(who, whom it lets in)` at the server and at the client, both of the current version.
async fn meet_as(server: (&Identity, &Trust), client: (&Identity, &Trust)) -> (End, End) {
    meet(server_config(server.0, server.1, &[ALPN]).unwrap(), client_config(client.0, client.1, &[ALPN]).unwrap()).await
}

fn assert_met((at_server, at_client): (End, End), server: &Identity, client: &Identity) {
    assert_eq!(peer_id_of(&at_server.unwrap()), Some(client.peer_id()));
    assert_eq!(peer_id_of(&at_client.unwrap()), Some(server.peer_id()));
}

/// Both ends failed with this TLS alert, raised by the server (else by the client). Returns their words, server first.
fn assert_refused((at_server, at_client): (End, End), by_server: bool, alert: u64) -> (String, String) {
    let (at_server, at_client) = (at_server.unwrap_err(), at_client.unwrap_err());
    let (raised, received) = if by_server { (&at_server, &at_client) } else { (&at_client, &at_server) };
    assert!(matches!(raised, ConnectionError::TransportError(error) if u64::from(error.code) == 0x100 + alert), "{raised:?}");
    assert!(
        matches!(received, ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) == 0x100 + alert),
        "{received:?}"
    );
    let own = PeerId::from_bytes([7; 32]);
    (rejection(&at_server, own).unwrap(), rejection(&at_client, own).unwrap())
}

const ACCESS_DENIED: u64 = 49;
const UNKNOWN_CA: u64 = 48;
const DECRYPT_ERROR: u64 = 51;

fn identities() -> (Identity, Identity) {
    (Identity::generate().unwrap(), Identity::generate().unwrap())
}

/// A client as another program may build it: keeps sessions, may have no certificate, or one that is not its own.
fn client_without_our_care(trust: &Trust, certified: Option<&Arc<CertifiedKey>>) -> QuicClientConfig {
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(trust, &provider())));
    let mut config = match certified {
        Some(certified) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified)))),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.try_into().unwrap()
}

/// A server as another program may build it.
fn server_without_our_care(trust: &Trust, certified: &Arc<CertifiedKey>) -> QuicServerConfig {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(Verifier::new(trust, &provider())))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.try_into().unwrap()
}

/// Signs certificates. Two of the same name differ in their keys only.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new(name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = pem_of(params.self_signed(&key).unwrap().der());
        Ca { issuer: Issuer::new(params, key), pem }
    }

    fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = pem::encode(&pem::Pem::new("PRIVATE KEY", key.serialize_der()));
        Identity::from_pem(&format!("{key}{}", pem_of(leaf.der()))).unwrap()
    }

    fn trust(&self) -> Trust {
        Trust::authority(&self.pem).unwrap()
    }
}

fn pem_of(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.as_ref()))
}

fn expired(params: &mut CertificateParams) {
    params.not_before = rcgen::date_time_ymd(2000, 1, 1);
    params.not_after = rcgen::date_time_ymd(2001, 1, 1);
}

#[tokio::test]
async fn listed_keys_meet_and_each_end_knows_the_other() {
    let (server, client) = identities();
    let met = meet_as((&server, &Trust::ids([client.peer_id()])), (&client, &Trust::ids([server.peer_id()]))).await;
    let (at_server, at_client) = (met.0.as_ref().unwrap(), met.1.as_ref().unwrap());
    for connection in [at_server, at_client] {
        let data = connection.handshake_data().unwrap().downcast::<quinn::crypto::rustls::HandshakeData>().unwrap();
        assert_eq!(data.protocol.as_deref(), Some(ALPN));
    }
    assert_met(met, &server, &client);
}

#[tokio::test]
async fn a_server_with_another_key_is_refused_by_the_client() {
    let (server, client) = identities();
    let expected = Identity::generate().unwrap();
    let met = meet_as((&server, &Trust::ids([client.peer_id()])), (&client, &Trust::ids([expected.peer_id()]))).await;
    let (_, at_client) = assert_refused(met, false, ACCESS_DENIED);
    assert!(at_client.starts_with("the peer's key is not the expected one"), "{at_client}");
}

#[tokio::test]
async fn an_unlisted_client_is_refused_by_the_server_and_told_its_id() {
    let (server, client) = identities();
    let met = meet_as((&server, &Trust::ids([server.peer_id()])), (&client, &Trust::ids([server.peer_id()]))).await;
    let (_, at_client) = assert_refused(met, true, ACCESS_DENIED);
    assert!(at_client.contains(&format!("let in {} there", "07".repeat(32))), "{at_client}");
}

#[tokio::test]
async fn the_list_counts_at_each_handshake_even_if_the_other_end_keeps_sessions() {
    let (server, client) = identities();
    let (servers, clients) = (Trust::ids([server.peer_id()]), Trust::ids([]));
    let ours = server_config(&server, &clients, &[ALPN]).unwrap();
    let keeping = client_without_our_care(&servers, Some(&client.certified()));
    let listener = endpoint(Some(quinn::ServerConfig::with_crypto(Arc::new(ours))));
    let config = quinn::ClientConfig::new(Arc::new(keeping));
    let caller = endpoint(None);
    let next = || call(&listener, &caller, config.clone());
    assert_refused(next().await, true, ACCESS_DENIED);
    assert!(clients.let_in(client.peer_id()) && !clients.let_in(client.peer_id()));
    assert_met(next().await, &server, &client);
    assert!(clients.shut_out(client.peer_id()) && !clients.shut_out(client.peer_id()));
    assert_refused(next().await, true, ACCESS_DENIED);
    assert!(clients.let_in(client.peer_id()));
    assert_met(next().await, &server, &client);

    let keeping = server_without_our_care(&clients, &server.certified());
    let ours = client_config(&client, &servers, &[ALPN]).unwrap();
    let listener = endpoint(Some(quinn::ServerConfig::with_crypto(Arc::new(keeping))));
    let config = quinn::ClientConfig::new(Arc::new(ours));
    let next = || call(&listener, &caller, config.clone());
    assert_met(next().await, &server, &client);
    assert!(servers.shut_out(server.peer_id()));
    assert_refused(next().await, false, ACCESS_DENIED);
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (server, client) = identities();
    let serving = server_config(&server, &Trust::ids([client.peer_id()]), &[ALPN]).unwrap();
    let met = meet(serving, client_without_our_care(&Trust::ids([server.peer_id()]), None)).await;
    let (at_server, _) = assert_refused(met, true, 116);
    assert!(at_server.starts_with("the peer sent no certificate"), "{at_server}");
}

#[tokio::test]
async fn another_ones_certificate_without_its_key_is_refused_in_either_role() {
    let (honest, victim) = identities();
    let thief = Identity::generate().unwrap();
    let stolen = Arc::new(CertifiedKey::new(victim.certified().cert.clone(), Arc::clone(&thief.certified().key)));
    let (lets_in_victim, lets_in_honest) = (Trust::ids([victim.peer_id()]), Trust::ids([honest.peer_id()]));

    let serving = server_config(&honest, &lets_in_victim, &[ALPN]).unwrap();
    let met = meet(serving, client_without_our_care(&lets_in_honest, Some(&stolen))).await;
    let (told, _) = assert_refused(met, true, DECRYPT_ERROR);
    assert!(told.starts_with("a signature is not by the key it should be by"), "{told}");

    let calling = client_config(&honest, &lets_in_victim, &[ALPN]).unwrap();
    assert_refused(meet(server_without_our_care(&lets_in_honest, &stolen), calling).await, false, DECRYPT_ERROR);
}

#[tokio::test]
async fn ends_without_a_common_version_do_not_connect() {
    let (server, client) = identities();
    let (at_server, at_client) = (Trust::ids([client.peer_id()]), Trust::ids([server.peer_id()]));
    let with = |offered: &[&[u8]]| {
        (server_config(&server, &at_server, &[ALPN]).unwrap(), client_config(&client, &at_client, offered).unwrap())
    };
    for offered in [&[b"pageferry/999".as_slice()][..], &[]] {
        let (serving, calling) = with(offered);
        let (told_server, told_client) = assert_refused(meet(serving, calling).await, true, 120);
        assert!(told_server.starts_with("the ends have no protocol version in common"), "{told_server}");
        assert!(told_client.starts_with("the ends have no protocol version in common"), "{told_client}");
    }
    let (serving, calling) = with(&[b"pageferry/999", ALPN]);
    assert_met(meet(serving, calling).await, &server, &client);
}

#[tokio::test]
async fn an_authority_lets_in_what_it_signed_and_no_other() {
    let ca = Ca::new("ours");
    let (server, client) = (ca.sign(|_| {}), ca.sign(|_| {}));
    assert_met(meet_as((&server, &ca.trust()), (&client, &ca.trust())).await, &server, &client);
    // The second stranger has our authority's name, and only its signature tells it apart.
    for (stranger, alert) in [(Ca::new("theirs"), UNKNOWN_CA), (Ca::new("ours"), DECRYPT_ERROR)] {
        let outsider = stranger.sign(|_| {});
        assert_refused(meet_as((&server, &ca.trust()), (&outsider, &ca.trust())).await, true, alert);
        assert_refused(meet_as((&outsider, &ca.trust()), (&client, &ca.trust())).await, false, alert);
    }
    let self_signed = Identity::generate().unwrap();
    let (_, told) = assert_refused(meet_as((&server, &ca.trust()), (&self_signed, &ca.trust())).await, true, UNKNOWN_CA);
    assert!(told.contains("not from an authority that the peer trusts"), "{told}");
}

#[tokio::test]
async fn an_authority_or_a_listed_key_is_enough() {
    let ca = Ca::new("ours");
    let (server, signed, listed) = (ca.sign(|_| {}), ca.sign(|_| {}), Identity::generate().unwrap());
    let both = ca.trust().and_ids([listed.peer_id()]);
    for client in [&signed, &listed] {
        assert_met(meet_as((&server, &both), (client, &ca.trust())).await, &server, client);
    }
    both.shut_out(listed.peer_id());
    assert_refused(meet_as((&server, &both), (&listed, &ca.trust())).await, true, UNKNOWN_CA);
}

#[tokio::test]
async fn dates_and_purpose_bind_what_an_authority_signed_but_not_a_listed_key() {
    const CERTIFICATE_EXPIRED: u64 = 45;
    const UNSUPPORTED_CERTIFICATE: u64 = 43;
    let ca = Ca::new("ours");
    let good = ca.sign(|_| {});
    let old = ca.sign(expired);
    let client_only = ca.sign(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
    let trust = ca.trust();
    assert_refused(meet_as((&good, &trust), (&old, &trust)).await, true, CERTIFICATE_EXPIRED);
    assert_refused(meet_as((&old, &trust), (&good, &trust)).await, false, CERTIFICATE_EXPIRED);
    assert_met(meet_as((&good, &trust), (&client_only, &trust)).await, &good, &client_only);
    assert_refused(meet_as((&client_only, &trust), (&good, &trust)).await, false, UNSUPPORTED_CERTIFICATE);

    let listed = Trust::ids([old.peer_id(), client_only.peer_id()]);
    assert_met(meet_as((&old, &listed), (&client_only, &listed)).await, &old, &client_only);
    assert_met(meet_as((&client_only, &listed), (&old, &listed)).await, &client_only, &old);
}

#[test]
fn an_authority_must_be_one() {
    let refuse = |pem: &str| Trust::authority(pem).unwrap_err().to_string();
    assert!(refuse("").contains("no CERTIFICATE section"));
    assert!(refuse("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").contains("authority 1 cannot be used"));
    assert!(refuse("-----BEGIN CERTIFICATE-----\nAAAA\n").contains("damaged"));
}

#[test]
fn only_a_failed_handshake_is_a_rejection() {
    let own = PeerId::from_bytes([7; 32]);
    assert_eq!(rejection(&ConnectionError::TimedOut, own), None);
    assert_eq!(rejection(&ConnectionError::LocallyClosed, own), None);
}
