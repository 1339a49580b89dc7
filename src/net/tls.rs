//! I/O: TLS 1.3 with both ends authenticated, as configurations for QUIC.
//!
//! Role: turns an [`Identity`] and a [`Trust`] into quinn's configurations; tells who the peer of a connection is, and in words
//! why a handshake failed. Neighbours: `identity`; the endpoint that dials and listens.
//! Invariants: both ends prove their key in every handshake (no resumption, no 0-RTT, no TLS 1.2); a client without a
//! certificate gets no connection; what a [`Trust`] does not name is refused.
//!
//! A client's handshake ends before the server has seen its certificate (RFC 8446 section 4.4): a client that is not let in holds
//! a connection for half a round trip, and learns of its refusal from the first thing it waits for.

use super::identity::{Identity, IdentityError, PeerId, certificates};
use crate::NetError;
use quinn::ConnectionError;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, PeerIncompatible, RootCertStore, SignatureScheme,
};
use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{borrow::Cow, fmt};

/// The version of the protocol, docs/protocol.md, as ALPN name: ends without a common one do not connect.
pub(crate) const ALPN: &[u8] = b"pageferry/1";

/// What a client passes as server name. Nothing looks at it: keys and authorities say who a peer is, addresses and names do not.
pub(crate) const SERVER_NAME: &str = "pageferry";

/// Who is let in: peers whose key is listed, peers with a certificate from an authority, or both.
///
/// - **Listed keys** ([`ids`](Trust::ids)): the key is the identity, so the certificate around it may be self-signed and its
///   dates do not matter. The list may change while servers and clients use it: clones share it.
/// - **An authority** ([`authority`](Trust::authority)): the chain must lead to it, be within its dates and, where it says so, be
///   meant for the role (client or server) that the peer plays. Names are not looked at, revocation lists are not supported:
///   use short dates.
///
/// A change counts from the next handshake; connections that exist stay.
///
/// ```
/// use pageferry::{Identity, Trust};
/// let (one, other) = (Identity::generate()?.peer_id(), Identity::generate()?.peer_id());
/// let trust = Trust::ids([one]);
/// let at_the_server = trust.clone();
/// trust.let_in(other);
/// assert!(at_the_server.lists(other) && at_the_server.shut_out(one));
/// assert!(!trust.lists(one));
/// # Ok::<(), pageferry::IdentityError>(())
/// ```
#[derive(Clone)]
pub struct Trust {
    ids: Arc<RwLock<HashSet<PeerId>>>,
    authority: Option<Authority>,
}

#[derive(Clone)]
struct Authority {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
}

impl Trust {
    /// Lets in the peers with these keys and no others. With none, nobody until [`let_in`](Trust::let_in).
    #[must_use]
    pub fn ids(ids: impl IntoIterator<Item = PeerId>) -> Trust {
        Trust { ids: Arc::new(RwLock::new(ids.into_iter().collect())), authority: None }
    }

    /// Lets in the peers whose certificate chain leads to one of the certificates in this PEM text.
    ///
    /// # Errors
    /// [`IdentityError::Pem`] or [`IdentityError::Certificate`] if the text is damaged, has no certificate, or one that cannot
    /// be an authority.
    pub fn authority(ca_pem: &str) -> Result<Trust, IdentityError> {
        let certificate = |reason: String| IdentityError::Certificate { reason };
        let mut roots = RootCertStore::empty();
        for (root, position) in certificates(ca_pem)?.into_iter().zip(1..) {
            roots.add(root).map_err(|error| certificate(format!("authority {position} cannot be used: {error}")))?;
        }
        if roots.is_empty() {
            return Err(certificate("the text has no CERTIFICATE section for an authority".into()));
        }
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|error| certificate(format!("the authority cannot be used: {error}")))?;
        Ok(Trust { authority: Some(Authority { roots, clients }), ..Trust::ids([]) })
    }

    /// Lets in the peers with these keys as well: the certificate of the authority or a listed key is enough.
    #[must_use]
    pub fn and_ids(self, ids: impl IntoIterator<Item = PeerId>) -> Trust {
        self.list_mut().extend(ids);
        self
    }

    /// Lists a key, here and in all clones. Returns whether it is new.
    pub fn let_in(&self, id: PeerId) -> bool {
        self.list_mut().insert(id)
    }

    /// Takes a key off the list, here and in all clones. Returns whether it was there. A peer with a certificate from the
    /// authority still gets in.
    pub fn shut_out(&self, id: PeerId) -> bool {
        self.list_mut().remove(&id)
    }

    /// Whether the key is listed. Says nothing about the authority, which needs the certificate.
    #[must_use]
    pub fn lists(&self, id: PeerId) -> bool {
        self.list().contains(&id)
    }

    // Each use of the lock is one operation on the set, so a panic elsewhere leaves no half-made change to be wary of.
    fn list(&self) -> RwLockReadGuard<'_, HashSet<PeerId>> {
        self.ids.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn list_mut(&self) -> RwLockWriteGuard<'_, HashSet<PeerId>> {
        self.ids.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a certificate on its key alone, else has `chain` ask the authority if there is one.
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        chain: impl FnOnce(&Authority) -> Result<(), rustls::Error>,
    ) -> Result<(), rustls::Error> {
        let id = PeerId::of_certificate(certificate)?;
        if self.lists(id) {
            return Ok(());
        }
        // The alert is access_denied, which tells the peer that its key was read and is not listed.
        let unlisted = || Err(CertificateError::ApplicationVerificationFailure.into());
        let checked = self.authority.as_ref().map_or_else(unlisted, chain);
        if let Err(error) = &checked {
            tracing::info!(peer = %id, %error, "a peer is not let in");
        }
        checked
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authorities = self.authority.as_ref().map_or(0, |authority| authority.roots.len());
        f.debug_struct("Trust").field("ids", &*self.list()).field("authorities", &authorities).finish()
    }
}

/// The server's half: speaks the protocols in `alpn`, by preference, and refuses clients that `trust` does not let in.
pub(crate) fn server_config(identity: &Identity, trust: &Trust, alpn: &[&[u8]]) -> Result<QuicServerConfig, NetError> {
    let provider = provider();
    let verifier = Verifier::new(trust, &provider);
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    // A resumed session would skip the client's certificate, and with it a key that was shut out meanwhile.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    QuicServerConfig::try_from(config).map_err(unusable)
}

/// The client's half: offers the protocols in `alpn` and refuses a server that `trust` does not let in.
pub(crate) fn client_config(identity: &Identity, trust: &Trust, alpn: &[&[u8]]) -> Result<QuicClientConfig, NetError> {
    let provider = provider();
    let verifier = Verifier::new(trust, &provider);
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    QuicClientConfig::try_from(config).map_err(unusable)
}

/// Who is at the other end; the handshake has proved it. `None` only before the handshake has ended.
pub(crate) fn peer_id_of(connection: &quinn::Connection) -> Option<PeerId> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    PeerId::of_certificate(chain.first()?).ok()
}

/// For a handshake that failed because the ends do not accept each other: why, and what to do. `own` is this end's id.
pub(crate) fn rejection(error: &ConnectionError, own: PeerId) -> Option<String> {
    let (code, by_this_end) = match error {
        ConnectionError::TransportError(error) => (error.code, true),
        ConnectionError::ConnectionClosed(close) => (close.error_code, false),
        _ => return None,
    };
    // CRYPTO_ERROR: 0x0100 and the TLS alert (RFC 9000 section 20.1).
    let alert = u8::try_from(u64::from(code).checked_sub(0x100)?).ok()?;
    let reason: Cow<'static, str> = match (AlertDescription::from(alert), by_this_end) {
        (AlertDescription::AccessDenied, true) => "the peer's key is not the expected one; check its peer id".into(),
        (AlertDescription::AccessDenied, false) => format!("the peer does not let in this end's key; let in {own} there").into(),
        (AlertDescription::UnknownCA, true) => "the peer's certificate is not from the authority that this end trusts".into(),
        (AlertDescription::UnknownCA, false) => {
            format!("this end's certificate is not from an authority that the peer trusts; get one, or let in {own} there").into()
        }
        (AlertDescription::DecryptError, _) => {
            "a signature is not by the key it should be by: a stolen certificate, or an authority of the same name with another key"
                .into()
        }
        (AlertDescription::CertificateRequired, true) => "the peer sent no certificate; it needs an identity".into(),
        (AlertDescription::NoApplicationProtocol, _) => {
            "the ends have no protocol version in common; run the same major version of pageferry at both".into()
        }
        _ => "TLS refused the handshake".into(),
    };
    Some(format!("{reason} ({error})"))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn unusable(error: impl fmt::Display) -> NetError {
    NetError::Identity { reason: error.to_string() }
}

/// [`Trust`] as rustls asks for it, for peers in either role.
#[derive(Debug)]
struct Verifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(trust: &Trust, provider: &CryptoProvider) -> Verifier {
        Verifier { trust: trust.clone(), algorithms: provider.signature_verification_algorithms }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = |authority: &Authority| {
            let leaf = ParsedCertificate::try_from(end_entity)?;
            verify_server_cert_signed_by_trust_anchor(&leaf, &authority.roots, intermediates, now, self.algorithms.all)
        };
        self.trust.check(end_entity, chain).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    /// The proof that the peer holds the key which [`Trust`] passed.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// None: a peer has one certificate and need not choose.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = |authority: &Authority| authority.clients.verify_client_cert(end_entity, intermediates, now).map(|_| ());
        self.trust.check(end_entity, chain).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

#[cfg(test)]
mod tests;
