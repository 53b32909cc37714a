{{- define "byok-gate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "byok-gate.fullname" -}}
{{- $name := include "byok-gate.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "byok-gate.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "byok-gate.fullname" .) -}}
{{- end -}}

{{- define "byok-gate.selector" -}}
app.kubernetes.io/name: {{ include "byok-gate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "byok-gate.labels" -}}
{{ include "byok-gate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "byok-gate.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The settings in force: the base's file, what tls and callers say, then `config`, which wins. */}}
{{- define "byok-gate.config" -}}
{{- $config := .Files.Get "files/byok-gate.yaml" | fromYaml -}}
{{- $callers := dict -}}
{{- if .Values.callers.tokensSecret -}}
{{- $_ := set $callers "token_file" "/etc/byok-gate/callers/tokens" -}}
{{- end -}}
{{- if .Values.callers.certificates -}}
{{- $_ := set $callers "certificates" .Values.callers.certificates -}}
{{- end -}}
{{- $_ := set $config "callers" $callers -}}
{{- if .Values.tls.clientCa -}}
{{- $_ := set $config.tls "client_ca" "/etc/byok-gate/tls/ca.crt" -}}
{{- end -}}
{{- mergeOverwrite $config (deepCopy .Values.config) | toYaml -}}
{{- end -}}

{{/* A peer of the NetworkPolicy: pods of these labels, of a namespace if one is named. */}}
{{- define "byok-gate.peer" -}}
{{- with .namespace -}}
namespaceSelector:
  matchLabels: {kubernetes.io/metadata.name: {{ . }}}
{{ end -}}
podSelector:
  matchLabels: {{- toYaml .podLabels | nindent 4 }}
{{- end -}}
