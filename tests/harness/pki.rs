//! Certificates for tests.

use std::path::Path;
use std::process::Command;

/// A CA, a server certificate and a client certificate, made by `openssl`.
pub fn certificates(dir: &Path) {
    let script = r#"
        set -e
        ca() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
            -keyout $1.key -out $1.pem -subj "/CN=$1"; }
        leaf() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $1.key \
            -out $1.csr -subj "/CN=$1"; printf "subjectAltName=$2\nextendedKeyUsage=$3\n" > $1.ext
            openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $1.pem \
            -extfile $1.ext $4; }
        ca ca; ca stranger
        leaf server DNS:localhost serverAuth "-days 2"
        leaf client DNS:edge-1 clientAuth "-days 2"
        leaf expired DNS:localhost serverAuth "-days -1"
    "#;
    let made = Command::new("bash").args(["-c", script]).current_dir(dir).output();
    let made = made.expect("bash and openssl are installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}
