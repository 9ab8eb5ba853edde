#!/usr/bin/env bash
# Makes the credentials of the compose stack, unless they are there: passwords, an authority, and a certificate that is made
# anew when it has less than thirty days left. A volume for each service that has to read them, as each runs as another user.
set -euo pipefail
umask 077
postgres=/secrets/postgres gateway=/secrets/gateway authority=/secrets/authority private=/secrets/private grafana=/secrets/grafana

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

make_passwords() {
    local password
    password="$(random)"
    random >"$grafana/password"
    printf '*:*:*:tidegate:%s\n' "$password" >"$gateway/pgpass"
    printf '%s' "$password" >"$postgres/password.new"
    # Last, as it is what says that there is a password.
    mv "$postgres/password.new" "$postgres/password"
    echo "made the database's passwords"
}

make_authority() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Tidegate compose authority" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$private/authority.key" -out "$private/authority.pem.new" 2>/dev/null
    mv "$private/authority.pem.new" "$private/authority.pem"
    rm -f "$gateway/gateway.pem"
    echo "made an authority"
}

make_certificate() {
    local extensions="$private/extensions"
    {
        echo "subjectAltName=DNS:gateway,DNS:sqlite,DNS:balancer,DNS:localhost,IP:127.0.0.1"
        echo "extendedKeyUsage=serverAuth"
        echo "basicConstraints=critical,CA:FALSE"
    } >"$extensions"
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=gateway" -keyout "$private/gateway.key" -out "$private/gateway.csr" 2>/dev/null
    openssl x509 -req -in "$private/gateway.csr" -CA "$private/authority.pem" -CAkey "$private/authority.key" -days 365 \
        -extfile "$extensions" -out "$private/gateway.pem" 2>/dev/null
    # The gateway takes a pair that does not match for one that is being replaced.
    mv "$private/gateway.key" "$gateway/gateway.key"
    mv "$private/gateway.pem" "$gateway/gateway.pem"
    echo "made the gateway's certificate"
}

[ -s "$postgres/password" ] || make_passwords
[ -s "$private/authority.pem" ] || make_authority
openssl x509 -checkend $((30 * 86400)) -noout -in "$gateway/gateway.pem" >/dev/null 2>&1 || make_certificate
cp "$private/authority.pem" "$authority/authority.pem"
# The gateways leave their first administrator's token there.
chown -R 65532:65532 "$gateway" /secrets/operator /secrets/sqlite-operator
chmod 755 "$postgres" "$grafana" "$authority"
chmod 444 "$postgres/password" "$grafana/password" "$authority/authority.pem"
