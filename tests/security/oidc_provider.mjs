// The npm package oidc-provider on loopback: signs in whoever POST /control names, without asking; rotates its keys.
import http from 'node:http'
import { generateKeyPairSync } from 'node:crypto'
import Provider from 'oidc-provider'

const [port, callback, secret] = process.argv.slice(2)
const issuer = `http://127.0.0.1:${port}`
let person = { sub: 's-1', preferred_username: 'ada', email: 'ada@example.org', groups: ['staff'] }
let keys = 0

const configuration = () => ({
  clients: [
    { client_id: 'confidential', client_secret: secret, redirect_uris: [callback] },
    { client_id: 'posting', client_secret: secret, redirect_uris: [callback], token_endpoint_auth_method: 'client_secret_post' },
    { client_id: 'public', redirect_uris: [callback], token_endpoint_auth_method: 'none' },
    { client_id: 'curve', redirect_uris: [callback], token_endpoint_auth_method: 'none', id_token_signed_response_alg: 'ES256' },
  ],
  pkce: { required: () => true },
  cookies: { keys: ['a secret of a test'] },
  claims: { openid: ['sub'], profile: ['preferred_username', 'groups'], email: ['email'] },
  features: { devInteractions: { enabled: false } },
  interactions: { url: (_, interaction) => `/interaction/${interaction.uid}` },
  findAccount: (_, sub) => ({ accountId: sub, claims: () => ({ ...person, sub }) }),
  async loadExistingGrant(ctx) {
    const grant = new ctx.oidc.provider.Grant({ clientId: ctx.oidc.client.clientId, accountId: ctx.oidc.session.accountId })
    grant.addOIDCScope('openid profile email')
    await grant.save()
    return grant
  },
  jwks: {
    keys: [['rsa', { modulusLength: 2048 }, 'RS256'], ['ec', { namedCurve: 'P-256' }, 'ES256']].map(([kind, options, alg]) => ({
      ...generateKeyPairSync(kind, options).privateKey.export({ format: 'jwk' }), kid: `${alg}-${keys}`, alg, use: 'sig',
    })),
  },
})

const make = () => {
  keys += 1
  return new Provider(issuer, configuration())
}
let provider = make()

http.createServer(async (request, response) => {
  if (request.url === '/control') {
    let body = ''
    for await (const part of request) body += part
    const { rotate, ...changes } = JSON.parse(body)
    person = { ...person, ...changes }
    if (rotate) provider = make()
    response.end('{}')
  } else if (request.url.startsWith('/interaction/')) {
    await provider.interactionFinished(request, response, { login: { accountId: person.sub } })
  } else {
    provider.callback()(request, response)
  }
}).listen(Number(port), '127.0.0.1', () => console.log('listening'))
