{{- /* Each of these changes `object` and writes nothing. */ -}}

{{- define "tasuki.label" -}}
{{- $metadata := .object.metadata }}
{{- $_ := set $metadata "labels" (merge (default dict $metadata.labels) .labels) }}
{{- if eq .object.kind "Deployment" }}
{{- $_ := set .object.spec.template "metadata" (dict "labels" .labels) }}
{{- end }}
{{- end }}

{{- define "tasuki.place" -}}
{{- $object := .object }}
{{- if and .root.Values.namespaced (hasPrefix "Cluster" $object.kind) }}
{{- $_ := set $object "kind" (trimPrefix "Cluster" $object.kind) }}
{{- with $object.roleRef }}{{ $_ := set . "kind" "Role" }}{{ end }}
{{- end }}
{{- if not (hasPrefix "Cluster" $object.kind) }}
{{- $_ := set $object.metadata "namespace" .root.Release.Namespace }}
{{- end }}
{{- $namespace := .root.Release.Namespace }}
{{- range $object.subjects }}{{ $_ := set . "namespace" $namespace }}{{ end }}
{{- end }}

{{- define "tasuki.pods" -}}
{{- $pod := .object.spec.template.spec }}
{{- $container := first $pod.containers }}
{{- with .values.replicas }}{{ $_ := set $.object.spec "replicas" . }}{{ end }}
{{- with .values.resources }}{{ $_ := set $container "resources" . }}{{ end }}
{{- $image := ternary .values.image .root.Values.image (eq .component "redis") }}
{{- with $image }}{{ $_ := set $container "image" . }}{{ end }}
{{- $env := .values.env | default list }}
{{- if eq .component "operator" }}
{{- with .root.Values.engineImage }}
{{- $env = prepend $env (dict "name" "TASUKI_ENGINE_IMAGE" "value" .) }}
{{- end }}
{{- if .root.Values.namespaced }}
{{- $env = prepend $env (dict "name" "TASUKI_NAMESPACES" "value" "$(NAMESPACE)") }}
{{- end }}
{{- end }}
{{- include "tasuki.environment" (dict "container" $container "env" $env) }}
{{- $_ := set .object.spec.template "spec" (mergeOverwrite $pod (.values.podSpec | default dict)) }}
{{- end }}

{{- define "tasuki.environment" -}}
{{- $names := list }}
{{- range .env }}{{ $names = append $names .name }}{{ end }}
{{- $kept := list }}
{{- range .container.env }}
{{- if not (has .name $names) }}{{ $kept = append $kept . }}{{ end }}
{{- end }}
{{- with concat $kept .env }}{{ $_ := set $.container "env" . }}{{ end }}
{{- end }}
