//! I/O: who a peer is: a key pair, the certificate that carries it through TLS, and the id made from its public key.
//!
//! Role: makes, reads and writes [`Identity`]; names a public key by its [`PeerId`]. Neighbours: `tls` builds its
//! configurations from these; imports nothing of this crate.
//! Invariants: the first certificate of a chain is for the identity's own key; a private key is never printed, and on disk is
//! never readable by other users, not even for a moment; no certificate, however broken, makes this module panic.

use rustls::CertificateError;
use rustls::pki_types::pem::{Error as PemError, PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fmt, str::FromStr, sync::Arc};
use thiserror::Error;

/// The largest identity file that is read: a key with a long chain has some 20 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The name of a peer: the SHA-256 of its public key (the DER of its SubjectPublicKeyInfo, RFC 5280 section 4.1).
///
/// It stays the same when the peer gets a new certificate for the same key. As text it is 64 lower-case hexadecimal digits.
/// The same value comes from `openssl pkey -in FILE -pubout -outform DER | sha256sum`.
///
/// ```
/// use pageferry::{Identity, PeerId};
/// let id = Identity::generate()?.peer_id();
/// assert_eq!(id.to_string().parse(), Ok(id));
/// let error = "12x4".parse::<PeerId>().unwrap_err();
/// assert_eq!(error.to_string(), "character 3 of the peer id is 'x'; only 0-9 and a-f may be there");
/// # Ok::<(), pageferry::IdentityError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId([u8; PeerId::LEN_BYTES]);

impl PeerId {
    /// Bytes in an id; its text has twice as many digits.
    pub const LEN_BYTES: usize = 32;

    /// The id with these bytes, for example as read from a message.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; PeerId::LEN_BYTES]) -> PeerId {
        PeerId(bytes)
    }

    /// The bytes of the SHA-256.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; PeerId::LEN_BYTES] {
        &self.0
    }

    fn of_public_key(spki_der: &[u8]) -> PeerId {
        let digest = ring::digest::digest(&ring::digest::SHA256, spki_der);
        let mut bytes = [0; PeerId::LEN_BYTES];
        bytes.copy_from_slice(digest.as_ref());
        PeerId(bytes)
    }

    /// The id of the key that `certificate` is for. Says nothing about who holds that key: TLS has to prove it.
    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Result<PeerId, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        Ok(PeerId::of_public_key(&parsed.subject_public_key_info()))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

/// A text is not a [`PeerId`].
///
/// ```
/// use pageferry::{PeerId, PeerIdError};
/// assert_eq!("c0ffee".parse::<PeerId>(), Err(PeerIdError::Length { got_digits: 6 }));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PeerIdError {
    /// All characters are hexadecimal digits, but there are too few or too many.
    #[error("the peer id has {got_digits} hexadecimal digits; it must have 64")]
    Length {
        /// How many there are.
        got_digits: usize,
    },
    /// A character is no hexadecimal digit.
    #[error("character {position} of the peer id is {character:?}; only 0-9 and a-f may be there")]
    Character {
        /// The first such character.
        character: char,
        /// Where it is, counted from 1, white space around the id left out.
        position: usize,
    },
}

impl FromStr for PeerId {
    type Err = PeerIdError;

    /// Accepts upper case and white space around the digits: ids are pasted from other programs.
    fn from_str(text: &str) -> Result<PeerId, PeerIdError> {
        let mut bytes = [0u8; PeerId::LEN_BYTES];
        let mut got_digits = 0;
        for character in text.trim().chars() {
            let digit = character.to_digit(16).ok_or(PeerIdError::Character { character, position: got_digits + 1 })?;
            if let Some(byte) = bytes.get_mut(got_digits / 2) {
                *byte = *byte << 4 | digit as u8;
            }
            got_digits += 1;
        }
        if got_digits == 2 * PeerId::LEN_BYTES { Ok(PeerId(bytes)) } else { Err(PeerIdError::Length { got_digits }) }
    }
}

/// A key pair and the certificate chain that carries its public key. Cheap to clone: clones share one key.
///
/// [`generate`](Identity::generate) makes a P-256 key with a self-signed certificate; that is all that peers need who let each
/// other in by [`PeerId`]. For an authority, have the key signed (`openssl req -new -key FILE` makes the request) and give the
/// answer to [`with_chain`](Identity::with_chain). `Debug` shows the id and never the private key.
///
/// ```
/// use pageferry::Identity;
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("identity.pem");
/// let identity = Identity::generate()?;
/// identity.save(&path)?;
/// assert_eq!(Identity::load(&path)?.peer_id(), identity.peer_id());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    peer_id: PeerId,
    /// As it came: the text form must hold the key again, and a signing key cannot be asked for it.
    key: PrivatePkcs8KeyDer<'static>,
    certified: Arc<CertifiedKey>,
}

impl Identity {
    /// A new key pair from the operating system's randomness, with a self-signed certificate.
    ///
    /// # Errors
    /// [`IdentityError::Generate`] if the system gives no randomness.
    pub fn generate() -> Result<Identity, IdentityError> {
        let generate = |error: rcgen::Error| IdentityError::Generate { reason: error.to_string() };
        let key = rcgen::KeyPair::generate().map_err(generate)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "pageferry");
        let certificate = params.self_signed(&key).map_err(generate)?;
        Identity::assemble(key.into(), vec![certificate.into()])
    }

    /// Reads what [`save`](Identity::save) wrote, or any PEM file that [`from_pem`](Identity::from_pem) takes.
    ///
    /// # Errors
    /// [`IdentityError::Exposed`] if the file's mode gives its group or others any access; [`IdentityError::Read`] if it
    /// cannot be read, has more than 1 MiB or is no regular file; [`IdentityError::InFile`] with the cause if its content is not an identity.
    pub fn load(path: impl AsRef<Path>) -> Result<Identity, IdentityError> {
        let path = path.as_ref();
        let read = |source: io::Error| IdentityError::Read { path: path.into(), source: Arc::new(source) };
        // Without O_NONBLOCK the open of a FIFO waits for a writer, with no bound.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(read)?;
        // Asked of the opened file: the path may name another one by now.
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(read(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path: path.into(), mode });
        }
        let mut pem = String::new();
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut pem).map_err(read)?;
        if pem.len() as u64 > MAX_FILE_BYTES {
            return Err(read(io::Error::new(io::ErrorKind::FileTooLarge, "it has more than 1 MiB")));
        }
        Identity::from_pem(&pem).map_err(|cause| IdentityError::InFile { path: path.into(), cause: Box::new(cause) })
    }

    /// Writes [`to_pem`](Identity::to_pem) to a file of mode 0600, replacing what was there.
    ///
    /// The file appears whole and durable or not at all: it is written beside `path`, synchronised and renamed.
    ///
    /// # Errors
    /// [`IdentityError::Write`]; nothing is left behind, and an older file at `path` is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), IdentityError> {
        let path = path.as_ref();
        write_private(path, self.to_pem().as_bytes())
            .map_err(|source| IdentityError::Write { path: path.into(), source: Arc::new(source) })
    }

    /// Takes one PKCS#8 private key (P-256, P-384, Ed25519 or RSA) and its certificate chain, leaf first. Other sections of
    /// the text are ignored.
    ///
    /// # Errors
    /// [`IdentityError::Pem`], [`IdentityError::Key`], [`IdentityError::Certificate`] or [`IdentityError::Mismatch`], with what
    /// is wrong and the remedy.
    pub fn from_pem(pem: &str) -> Result<Identity, IdentityError> {
        let mut keys = Vec::new();
        for section in sections(pem) {
            match section? {
                (SectionKind::PrivateKey, der) => keys.push(PrivatePkcs8KeyDer::from(der)),
                (SectionKind::EcPrivateKey | SectionKind::RsaPrivateKey, _) => {
                    return Err(IdentityError::Key { reason: "the key is in an older form than PKCS#8".into() });
                }
                _ => {}
            }
        }
        let [key] = <[_; 1]>::try_from(keys)
            .map_err(|keys| IdentityError::Key { reason: format!("the text has {} PRIVATE KEY sections", keys.len()) })?;
        Identity::assemble(key, certificates(pem)?)
    }

    /// The private key and the certificate chain as PEM. **The text is secret.**
    #[must_use]
    pub fn to_pem(&self) -> String {
        let key = pem::Pem::new("PRIVATE KEY", self.0.key.secret_pkcs8_der());
        let chain = self.0.certified.cert.iter().map(|certificate| pem::Pem::new("CERTIFICATE", certificate.as_ref()));
        let sections: Vec<_> = std::iter::once(key).chain(chain).collect();
        pem::encode_many_config(&sections, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
    }

    /// The same key with another certificate chain, leaf first; the authority's own certificate may be left out.
    ///
    /// # Errors
    /// [`IdentityError::Mismatch`] if the first certificate is for another key; [`IdentityError::Pem`] or
    /// [`IdentityError::Certificate`] if the chain cannot be read.
    pub fn with_chain(self, chain_pem: &str) -> Result<Identity, IdentityError> {
        Identity::assemble(self.0.key.clone_key(), certificates(chain_pem)?)
    }

    /// The name by which peers know this identity.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        self.0.peer_id
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.certified)
    }

    /// A secret for one purpose, the same whenever this identity asks for it: HMAC-SHA256 (RFC 2104) of the purpose under the private key. It tells nothing
    /// about the key, nor about the secret for another purpose.
    pub(crate) fn secret(&self, purpose: &str) -> ring::hmac::Tag {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, self.0.key.secret_pkcs8_der());
        ring::hmac::sign(&key, purpose.as_bytes())
    }

    /// The only way to an `Identity`: here key and chain are checked.
    fn assemble(key: PrivatePkcs8KeyDer<'static>, chain: Vec<CertificateDer<'static>>) -> Result<Identity, IdentityError> {
        let unusable = |reason: String| IdentityError::Key { reason };
        let signing = rustls::crypto::ring::sign::any_supported_type(&key.clone_key().into())
            .map_err(|error| unusable(format!("the private key cannot be used: {error}")))?;
        let public_key = signing.public_key().ok_or_else(|| unusable("the private key names no public key".into()))?;
        let peer_id = PeerId::of_public_key(&public_key);

        // Broken intermediates would otherwise be found by the peer only.
        let ids = chain.iter().zip(1..).map(|(certificate, position)| {
            PeerId::of_certificate(certificate).map_err(|error| IdentityError::Certificate {
                reason: match error {
                    // Its own text wraps the cause, such as an old certificate version, in the names of its types.
                    rustls::Error::InvalidCertificate(CertificateError::Other(cause)) => {
                        format!("certificate {position} cannot be read: {}", cause.0)
                    }
                    error => format!("certificate {position} cannot be read: {error}"),
                },
            })
        });
        let ids = ids.collect::<Result<Vec<PeerId>, _>>()?;
        match ids.first() {
            None => Err(IdentityError::Certificate { reason: "the text has no CERTIFICATE section".into() }),
            Some(&leaf) if leaf != peer_id => Err(IdentityError::Mismatch { key: peer_id, leaf }),
            Some(_) => Ok(Identity(Arc::new(Inner { peer_id, key, certified: Arc::new(CertifiedKey::new(chain, signing)) }))),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let certificates = self.0.certified.cert.len();
        f.debug_struct("Identity").field("peer_id", &self.0.peer_id).field("certificates", &certificates).finish_non_exhaustive()
    }
}

/// An identity or an authority could not be made, read or written.
///
/// ```
/// use pageferry::{Identity, IdentityError};
/// assert!(matches!(Identity::load("/no/such/file"), Err(IdentityError::Read { .. })));
/// assert!(matches!(Identity::from_pem(""), Err(IdentityError::Key { .. })));
/// ```
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file could not be read.
    #[error("identity file {} cannot be read: {source}; `Identity::save` makes one", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The file could not be written.
    #[error("identity file {} cannot be written: {source}; its directory must exist and be writable", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// Other users have access to the file; the key in it may be known to them.
    #[error("identity file {0} has mode {mode:04o}: users other than its owner have access to the private key; run: chmod 600 {0}", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The content of the file is no identity.
    #[error("identity file {}: {cause}", path.display())]
    InFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: Box<IdentityError>,
    },
    /// The text is not well-formed PEM (RFC 7468).
    #[error("the PEM text is damaged: {reason}; copy it again, whole")]
    Pem {
        /// Where it stops making sense.
        reason: String,
    },
    /// There is no private key that can be used.
    #[error(
        "{reason}; needed is one unencrypted PKCS#8 key (P-256, P-384, Ed25519 or RSA), which `openssl pkcs8 -topk8 -nocrypt -in FILE` makes"
    )]
    Key {
        /// What is wrong.
        reason: String,
    },
    /// There is no certificate, or one that cannot be used.
    #[error("{reason}; needed are X.509 version 3 certificates in PEM form, an identity's own first")]
    Certificate {
        /// What is wrong.
        reason: String,
    },
    /// The certificate is for another key.
    #[error(
        "the first certificate is for the key {leaf}, but the private key is {key}; use the certificate that was issued for it"
    )]
    Mismatch {
        /// The id of the private key.
        key: PeerId,
        /// The id of the certificate's key.
        leaf: PeerId,
    },
    /// No key could be generated.
    #[error("no key could be generated: {reason}; the system's random number generator must work")]
    Generate {
        /// Why.
        reason: String,
    },
}

/// The certificates in a PEM text, in order.
pub(crate) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    sections(pem)
        .filter_map(|section| match section {
            Ok((SectionKind::Certificate, der)) => Some(Ok(CertificateDer::from(der))),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
        .collect()
}

fn sections(pem: &str) -> impl Iterator<Item = Result<(SectionKind, Vec<u8>), IdentityError>> {
    <(SectionKind, Vec<u8>)>::pem_slice_iter(pem.as_bytes()).map(|section| {
        section.map_err(|error| {
            // The parser's own text shows a marker as a list of numbers, and a line of the text may be secret.
            let reason = match error {
                PemError::MissingSectionEnd { end_marker } => format!("no END line for {}", String::from_utf8_lossy(&end_marker)),
                PemError::IllegalSectionStart { .. } => "a BEGIN line without its five closing dashes".into(),
                error => error.to_string(),
            };
            IdentityError::Pem { reason }
        })
    })
}

/// Puts a file of mode 0600 with this content at `path`, whole or not at all.
fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let random = ring::rand::generate::<[u8; 8]>(&ring::rand::SystemRandom::new())
        .map_err(|_| io::Error::other("the system gives no randomness"))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}", u64::from_ne_bytes(random.expose())));
    let temporary = directory.join(temporary);

    // The mode is given at creation, so that there is no moment at which others can open the file; O_EXCL follows no link.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report; a file that cannot be removed is private still.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests;
